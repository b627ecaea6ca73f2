"""A reservation's legal life, and the book of those that live and how the others ended.

RESERVED ──▶ WRITING ──▶ ADMITTED      the blocks passed to the caller
    │          │  └────▶ CANCELLING    a write may still land, so the blocks stay that are not settled
    └──────────┴─────────────┴──▶ FREED
"""

from __future__ import annotations

import collections
import dataclasses
import enum

from scheduler.blocks import BlockPool, count_references
from spec.errors import TicketRefused, TransferFailed


class ReservationStage(enum.Enum):
    RESERVED = "reserved"
    WRITING = "writing"
    CANCELLING = "cancelling"
    ADMITTED = "admitted"
    FREED = "freed"


_S = ReservationStage
TRANSITIONS: dict[ReservationStage, frozenset[ReservationStage]] = {
    _S.RESERVED: frozenset({_S.WRITING, _S.FREED}),
    _S.WRITING: frozenset({_S.ADMITTED, _S.CANCELLING, _S.FREED}),
    _S.CANCELLING: frozenset({_S.FREED}),
    _S.ADMITTED: frozenset(),
    _S.FREED: frozenset(),
}
ENDED = frozenset({_S.ADMITTED, _S.FREED})


@dataclasses.dataclass(frozen=True, slots=True)
class Reservation:
    """What a ticket is made of. Tokens [held_tokens, num_tokens) are to come; those before are in the prefix cache."""

    reservation_id: str
    sequence_id: str
    producer_id: str
    producer_epoch: int
    block_ids: tuple[int, ...]  # of positions [0, num_tokens)
    generations: tuple[int, ...]
    held_tokens: int
    num_tokens: int
    deadline_s: float
    expires_s: float  # when the waiting clock runs out
    group: int = 0  # the one of the worker's groups whose blocks they are
    adapter: str = ""  # of the sequence


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    reservation: Reservation
    block_hashes: list[bytes]
    landed_tokens: int  # positions [0, landed_tokens) are there and verified
    expires_s: float
    settled_tokens: int  # positions [0, settled_tokens) were found right, and no write to them is to come
    settled_blocks: int  # of these the full ones: they are prefix content
    returned_blocks: int = 0  # the first so many went back to the pool before the others
    stage: ReservationStage = ReservationStage.RESERVED

    @property
    def held_blocks(self) -> tuple[int, ...]:
        """Those on which it has a reference."""
        return self.reservation.block_ids[self.returned_blocks :]


class ReservationBook:
    """Every live reservation, the last `max_tombstones` ended ones, and what is counted. Decides nothing."""

    def __init__(self, pool: BlockPool, max_tombstones: int) -> None:
        self.refused: collections.Counter[str] = collections.Counter()  # tickets and chunks refused, by reason
        self._pool = pool
        self._max_tombstones = max_tombstones
        self._live: dict[str, Entry] = {}
        self._tombstones: collections.OrderedDict[str, str] = collections.OrderedDict()  # id -> how it ended
        self._totals: collections.Counter[str] = collections.Counter()

    def _find(self, reservation_id: str) -> Entry:
        if (entry := self._live.get(reservation_id)) is None:
            reason = "ended" if reservation_id in self._tombstones else "unknown"
            raise self._refusal(reason, reservation_id, self._tombstones.get(reservation_id, ""))
        return entry

    def _refusal(self, reason: str, reservation_id: str, how_it_ended: str = "") -> TicketRefused:
        self.refused[reason] += 1
        suffix = f" ({how_it_ended})" if how_it_ended else ""
        return TicketRefused(f"reservation {reservation_id}: {reason}{suffix}", reservation_id=reservation_id)

    def _gap(self, reservation_id: str, first_token: int, end_token: int) -> TransferFailed:
        self.refused["gap"] += 1
        return TransferFailed(f"tokens {first_token} to {end_token} did not come", reservation_id=reservation_id)

    def _advance(self, entry: Entry, to: ReservationStage) -> None:
        assert to in TRANSITIONS[entry.stage], f"no reservation goes from {entry.stage.value} to {to.value}"
        entry.stage = to

    def _return_settled(self, entry: Entry) -> None:
        """Of a request that failed: what nobody writes any more goes back, and stays as prefix."""
        self._pool.release(entry.reservation.block_ids[entry.returned_blocks : entry.settled_blocks])
        entry.returned_blocks = entry.settled_blocks

    def _free(self, entry: Entry, how_it_ended: str) -> None:
        self._pool.release(entry.held_blocks)
        self._bury(entry, _S.FREED, how_it_ended)

    def _bury(self, entry: Entry, to: ReservationStage, how_it_ended: str) -> None:
        self._advance(entry, to)
        del self._live[entry.reservation.reservation_id]
        self._tombstones[entry.reservation.reservation_id] = how_it_ended
        while len(self._tombstones) > self._max_tombstones:
            self._tombstones.popitem(last=False)
        self._totals[to.value] += 1

    def was_admitted(self, reservation_id: str) -> bool:
        """As far as tombstones reach."""
        return self._tombstones.get(reservation_id) == ReservationStage.ADMITTED.value

    def reserved_blocks(self) -> int:
        return sum(len(entry.held_blocks) for entry in self._live.values())

    def quarantined_blocks(self) -> int:
        """Of requests that failed, until their writer is quiet."""
        failed = [entry for entry in self._live.values() if entry.stage is _S.CANCELLING]
        return sum(len(entry.held_blocks) for entry in failed)

    def counts(self) -> dict[str, int]:
        """What must be zero when nothing runs (P3)."""
        stages = collections.Counter(entry.stage for entry in self._live.values())
        live = {f"reservations_{stage.value}": stages[stage] for stage in _S if stage not in ENDED}
        return {**live, "reserved_blocks": self.reserved_blocks()}

    def totals(self) -> dict[str, int]:
        """What only grows."""
        names = ("reserved", "admitted", "freed", "failed", "expired")
        return {**{name: self._totals[name] for name in names}, "refused": self.refused.total()}

    def references(self) -> collections.Counter[int]:
        """References on blocks that reservations hold."""
        return count_references(entry.held_blocks for entry in self._live.values())

    def check(self) -> None:
        """Asserts the invariants."""
        assert all(self._pool.references(block) >= count for block, count in self.references().items())
        for entry in self._live.values():
            reservation = entry.reservation
            assert entry.stage not in ENDED
            assert reservation.held_tokens <= entry.landed_tokens <= reservation.num_tokens
            generations = tuple(self._pool.generation(block) for block in entry.held_blocks)
            assert reservation.generations[entry.returned_blocks :] == generations
            assert entry.returned_blocks in (0, entry.settled_blocks)
            assert entry.settled_blocks * self._pool.block_tokens <= entry.landed_tokens
        assert not self._live.keys() & self._tombstones.keys()
        assert len(self._tombstones) <= self._max_tombstones
