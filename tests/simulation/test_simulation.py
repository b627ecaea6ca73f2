"""The product under a simulated network, clock and engine: seeded faults break no promise; planted bugs are found."""

from __future__ import annotations

import collections
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from decode_svc.move import Move
from decode_svc.placements import Placed, Placements
from kvtransfer import ticket as tickets
from legato.v1 import worker_pb2
from prefill_svc.call import PrefillCall
from router.journey import Journey
from scheduler.handoff import Reservations
from scheduler.prefix import PrefixCache
from scheduler.reservation import Entry, ReservationStage
from tests.simulation.schedule import (
    CLIENT_LEAVES,
    CUT_LINK,
    DRAIN,
    KINDS,
    MESSAGES,
    PREFILL_DIES,
    RESTART,
    SLOW_LINK,
    TICKETS,
    WRITES,
)
from tests.simulation.shares import Tally, play_shares
from tests.simulation.world import Violation, play
from worker.core import Core
from worker.landing import LandingCheck
from worker.prefix_sends import PrefixSends
from worker.quarantine import Quarantine
from worker.receiver import Receiver
from worker.warming import Warming

ROOT = Path(__file__).resolve().parents[2]
SEEDS = 2000  # of any number: `make simulate` plays 100,000


def test_no_schedule_of_faults_breaks_a_promise() -> None:
    tally = Tally()
    for share in play_shares(range(SEEDS), jobs=2):
        tally.add(share)
    assert not tally.broken, "\n".join(tally.broken)
    assert {kind for kind, _ in tally.hits} == set(KINDS)
    assert tally.done["tokens of prefixes fetched"] > SEEDS // 4
    assert min(tally.done.values()) > 0, tally.done
    ends = tally.ends
    assert ends["finished"] > 3 * SEEDS
    assert ends["DEADLINE_EXCEEDED"] > SEEDS // 10
    assert set(ends) <= {"finished", "left", "DEADLINE_EXCEEDED", "UNREACHABLE", "NO_WORKERS", *HAND_OVER, *LOST}, ends


HAND_OVER = ("TICKET_REFUSED", "DIGEST_MISMATCH", "TRANSFER_FAILED")
LOST = ("WORKER_LOST", "DRAINING", "OUT_OF_BLOCKS", "OVERLOADED")


def test_a_worker_that_is_killed_as_it_starts_again_dies_once() -> None:
    """Two faults of this seed strike it at once."""
    play(205659)


def test_a_seed_replays_exactly() -> None:
    """In this process, and in another whose strings have other hashes."""
    seeds = range(20, 26)
    here = [play(seed).fingerprint for seed in seeds]
    assert here == [play(seed).fingerprint for seed in seeds]
    code = f"from tests.simulation.world import play; print(*(play(s).fingerprint for s in {seeds!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == here


# ---- planted bugs ----------------------------------------------------------------------------------------------------


def free_on_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    fail = Reservations.fail

    def failed(self: Reservations, reservation_id: str, reason: str, now_s: float) -> bool:
        done = fail(self, reservation_id, reason, now_s)
        self.quiet(reservation_id, now_s)
        return done

    monkeypatch.setattr(Reservations, "fail", failed)


def silence_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    async def yes(self: Quarantine, ticket: worker_pb2.Ticket, said_address: str) -> bool:
        return True

    monkeypatch.setattr(Quarantine, "_says_so", yes)


def stranger_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever answers at the writer's address is taken for the writer."""
    monkeypatch.setattr(Quarantine, "_is_the_writer", lambda self, answer, ticket: True)


def cut_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Core, "cut", lambda self, transport, links: None)


def source_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of chunks that are on their way go with their sequence."""
    monkeypatch.setattr(PrefillCall, "leaving", lambda self, block_table, end: ())


def ticket_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its signature nor what it says."""

    def parsed(key: bytes, signed: worker_pb2.SignedTicket, *, now_unix_ns: int) -> worker_pb2.Ticket:
        return worker_pb2.Ticket.FromString(signed.ticket)

    def begin(self: Reservations, reservation_id: str, *, now_s: float, **_ticket: Any) -> None:
        entry = self._find(reservation_id)
        if entry.stage is ReservationStage.RESERVED:
            self._advance(entry, ReservationStage.WRITING)
        self._progress(entry, now_s)

    monkeypatch.setattr(tickets, "verify", parsed)
    monkeypatch.setattr(Receiver, "_check", lambda self, ticket: {0})
    monkeypatch.setattr(Reservations, "begin", begin)


def lease_never_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reservations, "expire", lambda self, now_s: [])
    monkeypatch.setattr(Reservations, "next_expiry_s", lambda self: None)


def late_message_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk or the Final that crosses the end of its request."""
    ours = Receiver._ours

    def placed(self: Receiver) -> Placed | None:
        assert self.ticket is not None
        entry = self._core.reservations._each[0]._live.get(self.ticket.reservation_id)
        return ours(self) or (Placed(reservation=entry.reservation) if entry is not None else None)

    def writing(self: Reservations, reservation_id: str, now_s: float) -> Entry:
        entry = self._find(reservation_id)
        entry.stage = ReservationStage.WRITING
        return entry

    admit = Placements.admit

    async def admitted(self: Placements, ticket: worker_pb2.Ticket, final: Any, claimed: Any) -> None:
        taking = copy.copy(self)  # what was given up is taken, and stays given up for who looks at it elsewhere
        taking.placed = cast(Any, collections.ChainMap(self.placed, {ticket.sequence_id: claimed()}))
        await admit(taking, ticket, final, claimed)

    monkeypatch.setattr(Placements, "admit", admitted)
    monkeypatch.setattr(Reservations, "_return_settled", lambda self, entry: None)  # it may still be admitted
    monkeypatch.setattr(Receiver, "_ours", placed)
    monkeypatch.setattr(Reservations, "_writing", writing)


def digest_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def nothing(self: LandingCheck, *_arguments: Any) -> None:
        pass

    monkeypatch.setattr(LandingCheck, "compare", nothing)


def token_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a decode worker says again is taken again."""
    decoded = Journey._decoded

    def again(self: Journey, output: worker_pb2.SequenceOutput, placement: Any) -> Any:
        output.first_index = len(self._output)
        return decoded(self, output, placement)

    monkeypatch.setattr(Journey, "_decoded", again)


def adapter_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of equal tokens are taken for equal."""
    hashes = PrefixCache.hashes

    def of_tokens(self: PrefixCache, token_ids: Sequence[int], adapter: str = "") -> Any:
        return hashes(self, token_ids, "")

    monkeypatch.setattr(PrefixCache, "hashes", of_tokens)


def tier_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes out of a tier is published before it is there."""
    monkeypatch.setattr(Warming, "_fill", lambda self, ranks, wanted: len(wanted))


def wrong_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first group's memory stands for each."""
    monkeypatch.setattr(Core, "ranks_of", lambda self, group: tuple(r for r in self.ranks if r.group == 0))


def prefix_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    hold = PrefixSends._hold

    def reversed_table(self: PrefixSends, request: worker_pb2.SendPrefixRequest) -> tuple[int, tuple[int, ...]]:
        group, table = hold(self, request)
        return group, table[::-1]

    monkeypatch.setattr(PrefixSends, "_hold", reversed_table)


def moved_and_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence is handed over while it goes on where it was."""

    def take_out(self: Move) -> None:
        self._stop(held=True)

    monkeypatch.setattr(Move, "_take_out", take_out)


PLANTED = [
    (free_on_failure, (WRITES, CLIENT_LEAVES), "given away|not for it|not its own"),
    (silence_is_quiet, (CUT_LINK, WRITES), "given away|not for it|not its own"),
    (stranger_is_believed, (RESTART, WRITES), "given away|not for it|not its own"),
    (cut_is_not_made, (PREFILL_DIES, WRITES), "given away|not for it|not its own"),
    (source_is_not_held, (WRITES,), "not its own|which it is not"),
    (ticket_unchecked, (TICKETS,), "used before, or forged|given away"),
    (lease_never_expires, (MESSAGES,), "come to rest"),
    (late_message_accepted, (SLOW_LINK, CLIENT_LEAVES), "runs on .*, which was given up"),
    (digest_unchecked, (WRITES,), "not its own|which it is not"),
    (token_repeated, (MESSAGES,), "begins no"),
    (adapter_forgotten, (SLOW_LINK,), "not its own|which it is not"),
    (tier_not_waited_for, (SLOW_LINK,), "not its own|which it is not"),
    (wrong_group, (SLOW_LINK,), "not its own|which it is not"),
    (prefix_in_any_order, (SLOW_LINK,), "not its own|which it is not"),
    (moved_and_stayed, (DRAIN,), "runs on .*, which was given up"),
]


@pytest.mark.parametrize(("plant", "faults", "found"), PLANTED, ids=[plant.__name__ for plant, _, _ in PLANTED])
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], faults: Sequence[str], found: str
) -> None:
    """By what it breaks, in a seed that breaks nothing without it."""
    played: list[int] = []

    def play_all() -> None:
        for seed in range(400):
            played.append(seed)
            play(seed, faults)

    with monkeypatch.context() as planted:
        plant(planted)
        with pytest.raises(Violation, match=found):
            play_all()
    play(played[-1], faults)
