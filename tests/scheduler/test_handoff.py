"""Reservations: every transition, and every misuse refused, counted and without effect."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.batch import Scheduler, SchedulerConfig, Tokens
from scheduler.handoff import ENDED, TRANSITIONS, HandoffConfig, Reservation, Reservations, ReservationStage
from scheduler.sequence import Sequence
from spec.errors import ContextTooLong, InvalidConfiguration, OutOfBlocks, TicketRefused, TransferFailed
from spec.sampling import SamplingParams

RESERVED, WRITING, CANCELLING = ReservationStage.RESERVED, ReservationStage.WRITING, ReservationStage.CANCELLING
PROMPT = tuple(range(10))


class Consumer:
    def __init__(self, **changes: Any) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(num_blocks=12, block_tokens=4, max_step_tokens=64, max_sequences=4, max_context_tokens=40)
        )
        config = HandoffConfig(**({"max_reservations": 3, "max_context_tokens": 40, "lease_s": 5.0} | changes))
        self.reservations = Reservations(
            self.scheduler.pool, self.scheduler.prefix, config, "decode-1@7", self.scheduler.spare_blocks
        )

    def reserve(self, name: str = "a", tokens: tuple[int, ...] = PROMPT, **changes: Any) -> Reservation:
        values = {"producer_id": "prefill-1", "producer_epoch": 3, "deadline_s": 100.0, "now_s": 0.0} | changes
        return self.reservations.reserve(name, tokens, **values)

    def begin(self, reservation: Reservation, now_s: float = 1.0, **changes: Any) -> None:
        names = ("sequence_id", "producer_id", "producer_epoch", "block_ids", "generations")
        values = {name: getattr(reservation, name) for name in names} | changes
        reservation_id = values.pop("reservation_id", reservation.reservation_id)
        self.reservations.begin(reservation_id, now_s=now_s, **values)

    def bring_to(self, stage: ReservationStage) -> Reservation:
        reservation = self.reserve()
        if stage is not RESERVED:
            self.begin(reservation)
        if stage is CANCELLING:
            assert self.reservations.fail(reservation.reservation_id, "test", 1.0)
        assert self.stage is stage
        return reservation

    @property
    def stage(self) -> ReservationStage | None:
        """Of the only reservation that is live."""
        counts = self.reservations.counts()
        found = [at for at in (RESERVED, WRITING, CANCELLING) for _ in range(counts[f"reservations_{at.value}"])]
        assert len(found) <= 1
        return found[0] if found else None

    def check(self) -> None:
        self.scheduler.check()
        self.reservations.check()
        self.scheduler.pool.check(self.scheduler.references() + self.reservations.references())

    def assert_empty(self) -> None:
        self.check()
        assert set(self.reservations.counts().values()) == {0}
        assert set(self.scheduler.counts().values()) == {0}


@pytest.fixture
def consumer() -> Consumer:
    return Consumer()


def test_writers_that_are_lost_cost_their_blocks_and_not_the_others_their_turn() -> None:
    consumer = Consumer(max_reservations=2)
    for name in "ab":
        lost = consumer.reserve(name, tuple(range(4)))
        consumer.begin(lost)
        consumer.reservations.fail(lost.reservation_id, "its host lost power", 2.0)
    assert consumer.reservations.counts()["reservations_cancelling"] == 2
    for name in "cd":
        consumer.reserve(name, now_s=3.0)
    with pytest.raises(OutOfBlocks, match="2 hand-overs"):
        consumer.reserve("e", tuple(range(4)), now_s=3.0)
    consumer.check()


def test_a_hand_over_from_reserve_to_the_running_batch(consumer: Consumer, fake: SimpleNamespace) -> None:
    reservations, scheduler = consumer.reservations, consumer.scheduler
    engine = fake.Engine(12, 4)
    reservation = consumer.reserve()
    assert (len(reservation.block_ids), reservation.held_tokens, reservation.num_tokens) == (3, 0, 10)
    assert reservations.counts() == {
        "reservations_reserved": 1,
        "reservations_writing": 0,
        "reservations_cancelling": 0,
        "reserved_blocks": 3,
    }
    consumer.begin(reservation)
    engine.write(reservation.block_ids, 0, fake.kv_of(PROMPT))
    reservations.landed(reservation.reservation_id, 0, 4, 2.0)
    reservations.landed(reservation.reservation_id, 4, 6, 3.0)
    consumer.check()
    table = reservations.complete(reservation.reservation_id, 4.0)
    assert table == reservation.block_ids
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    expected, _ = fake.answer(PROMPT, [], params, (), 40)
    sequence = Sequence("a", PROMPT, expected[:1], params)
    scheduler.adopt(sequence, table, reservation.num_tokens, 4.0)
    consumer.check()
    found = scheduler.prefix.match([*PROMPT, 1])
    assert found == [*table[:2]], "what was verified is prefix content"
    scheduler.pool.release(found)
    told: list[Tokens] = []
    while (plan := scheduler.plan(5.0)) is not None:
        events = scheduler.commit(plan, engine.execute(plan), 6.0)
        told += [event for event in events if isinstance(event, Tokens)]
    assert sequence.output_token_ids == expected
    assert [event.first_index for event in told] == [1, 2, 3, 4, 5]
    assert (told[0].queued_s, told[0].started_s, told[0].drawn_s) == (4.0, 5.0, 6.0)
    consumer.assert_empty()


def test_what_is_here_of_another_adapter_is_not_shared(consumer: Consumer) -> None:
    first = consumer.reserve("a", adapter="poems@1")
    consumer.begin(first)
    consumer.reservations.landed(first.reservation_id, 0, 10, 1.0)
    consumer.scheduler.pool.release(consumer.reservations.complete(first.reservation_id, 1.0))
    for adapter, held in (("", 0), ("poems@2", 0), ("poems@1", 8)):
        again = consumer.reserve(f"b {adapter}", adapter=adapter, now_s=2.0)
        assert (again.adapter, again.held_tokens) == (adapter, held)
        consumer.reservations.fail(again.reservation_id, "test", 2.0)
    consumer.assert_empty()


def test_what_is_here_already_is_shared_and_need_not_come(consumer: Consumer) -> None:
    first = consumer.reserve("a")
    consumer.begin(first)
    consumer.reservations.landed(first.reservation_id, 0, 10, 1.0)
    consumer.scheduler.pool.release(consumer.reservations.complete(first.reservation_id, 1.0))
    second = consumer.reserve("b", (*range(9), 44, 45), now_s=2.0)
    assert second.held_tokens == 8
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.generations[:2] == first.generations[:2]
    assert (second.block_ids[2], second.generations[2]) != (first.block_ids[2], first.generations[2])
    consumer.begin(second, now_s=2.0)
    consumer.check()
    with pytest.raises(TicketRefused):
        consumer.reservations.landed(second.reservation_id, 0, 8, 3.0)
    consumer.reservations.landed(second.reservation_id, 8, 3, 3.0)
    consumer.scheduler.pool.release(consumer.reservations.complete(second.reservation_id, 3.0))
    consumer.assert_empty()


def test_a_hand_over_that_fails_leaves_what_had_landed(consumer: Consumer) -> None:
    """Settled blocks go back on the first verdict, as prefix; those that may still be written on the second."""
    reservations, pool = consumer.reservations, consumer.scheduler.pool
    first = consumer.reserve("a")
    consumer.begin(first)
    reservations.landed(first.reservation_id, 0, 7, 1.0)
    assert consumer.scheduler.prefix.match([*PROMPT, 1]) == [], "its digest alone publishes nothing"
    reservations.settled(first.reservation_id, 0, 7)
    consumer.check()
    shared = consumer.reserve("b", now_s=1.0)  # while the first is still being written
    assert shared.held_tokens == 4
    assert reservations.fail(shared.reservation_id, "test", 1.0)
    assert pool.num_held == 3
    reservations.landed(first.reservation_id, 7, 2, 1.0)
    assert reservations.fail(first.reservation_id, "its producer died", 2.0)
    assert (pool.num_held, pool.num_cached) == (2, 1)
    assert consumer.reservations.counts()["reserved_blocks"] == 2
    reservations.settled(first.reservation_id, 7, 2)  # it was on its way to the device
    assert (pool.num_held, pool.num_cached) == (1, 2)
    consumer.check()
    again = consumer.reserve("c", (*range(9), 44, 45), producer_id="prefill-2", now_s=2.0)
    assert again.held_tokens == 8
    assert again.block_ids[:2] == first.block_ids[:2]
    assert first.block_ids[2] not in again.block_ids, "a write may still land there"
    assert reservations.quiet(first.reservation_id, 3.0)
    reservations.settled(first.reservation_id, 7, 2)
    consumer.begin(again, now_s=3.0, producer_id="prefill-2")
    reservations.landed(again.reservation_id, 8, 3, 3.0)
    pool.release(reservations.complete(again.reservation_id, 3.0))
    consumer.assert_empty()


def test_behind_a_chunk_without_a_digest_nothing_is_settled(consumer: Consumer) -> None:
    first = consumer.bring_to(WRITING)
    for start, count in ((0, 4), (4, 4), (8, 2)):
        consumer.reservations.landed(first.reservation_id, start, count, 1.0)
        if start != 4:
            consumer.reservations.settled(first.reservation_id, start, count)
    assert consumer.reserve("b").held_tokens == 4
    consumer.check()


def test_the_table_of_transitions_is_what_the_verbs_do() -> None:
    """Each verb from each stage: where the table has no arrow, nothing moves."""

    def land_all(c: Consumer, r: Reservation) -> None:
        c.reservations.landed(r.reservation_id, 0, 10, 1.0)
        c.scheduler.pool.release(c.reservations.complete(r.reservation_id, 1.0))

    verbs: dict[str, Callable[[Consumer, Reservation], object]] = {
        "begin": lambda c, r: c.begin(r),
        "land all": land_all,
        "fail": lambda c, r: c.reservations.fail(r.reservation_id, "test", 1.0),
        "quiet": lambda c, r: c.reservations.quiet(r.reservation_id, 1.0),
        "expire": lambda c, r: c.reservations.expire(50.0),
    }
    expected: dict[tuple[ReservationStage, str], ReservationStage | None] = {
        (RESERVED, "begin"): WRITING,
        (RESERVED, "fail"): None,
        (RESERVED, "expire"): None,
        (WRITING, "land all"): None,
        (WRITING, "fail"): CANCELLING,
        (WRITING, "quiet"): None,
        (WRITING, "expire"): CANCELLING,
        (CANCELLING, "quiet"): None,
    }
    for stage, (name, verb) in itertools.product((RESERVED, WRITING, CANCELLING), verbs.items()):
        consumer = Consumer()
        reservation = consumer.bring_to(stage)
        held = consumer.scheduler.pool.num_held
        refused = False
        try:
            verb(consumer, reservation)
        except TicketRefused:
            refused = True
        found = consumer.stage
        assert found is expected.get((stage, name), stage), (stage, name)
        assert not refused or found is stage
        assert consumer.scheduler.pool.num_held == (0 if found is None else held), "no free before quiet"
        consumer.check()
    for stage in (RESERVED, WRITING, CANCELLING):
        reached = {to for (at, _), to in expected.items() if at is stage}
        assert {to for to in TRANSITIONS[stage] if to not in ENDED} == reached - {None}
        assert (None in reached) == bool(TRANSITIONS[stage] & ENDED)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"reservation_id": "decode-1@7/99"}, "unknown"),
        ({"reservation_id": "decode-1@6/1"}, "unknown"),
        ({"sequence_id": "b"}, "other sequence"),
        ({"producer_id": "prefill-2"}, "other producer"),
        ({"producer_epoch": 4}, "other epoch"),
        ({"block_ids": (0, 1)}, "other blocks"),
        ({"block_ids": (0, 1, 2, 3)}, "other blocks"),
        ({"generations": (1, 1, 2)}, "stale generation"),
        ({"now_s": 5.0}, "lease ran out"),
    ],
)
def test_a_ticket_that_is_not_of_the_reservation_opens_nothing(
    consumer: Consumer, changes: dict[str, Any], reason: str
) -> None:
    reservation = consumer.reserve()
    with pytest.raises(TicketRefused, match=reason):
        consumer.begin(reservation, **changes)
    assert consumer.reservations.refused == {reason: 1}
    assert consumer.stage is RESERVED
    consumer.begin(reservation, now_s=4.9)


def test_a_ticket_opens_once_and_never_after_its_end(consumer: Consumer) -> None:
    reservation = consumer.bring_to(WRITING)
    with pytest.raises(TicketRefused, match="begun before"):
        consumer.begin(reservation)
    consumer.reservations.fail(reservation.reservation_id, "the client left", 1.0)
    with pytest.raises(TicketRefused, match="begun before"):
        consumer.begin(reservation)
    consumer.reservations.quiet(reservation.reservation_id, 2.0)
    with pytest.raises(TicketRefused, match=r"ended \(its writer stopped\)"):
        consumer.begin(reservation)
    again = consumer.reserve("a", now_s=2.0)
    assert again.reservation_id != reservation.reservation_id
    with pytest.raises(TicketRefused, match="ended"):
        consumer.begin(reservation)
    with pytest.raises(TicketRefused, match="generation"):
        consumer.begin(again, generations=reservation.generations)
    consumer.reservations.fail(again.reservation_id, "", 2.0)
    consumer.assert_empty()


@pytest.mark.parametrize(
    ("first", "count", "error", "reason"),
    [
        (0, 4, TicketRefused, "repeated chunk"),
        (3, 4, TicketRefused, "repeated chunk"),
        (4, 0, TicketRefused, "repeated chunk"),
        (4, 7, TicketRefused, "overlong chunk"),
        (5, 4, TransferFailed, "gap"),
    ],
)
def test_a_chunk_lands_once_and_in_order(
    consumer: Consumer, first: int, count: int, error: type[Exception], reason: str
) -> None:
    reservation = consumer.bring_to(WRITING)
    consumer.reservations.landed(reservation.reservation_id, 0, 4, 1.0)
    with pytest.raises(error):
        consumer.reservations.landed(reservation.reservation_id, first, count, 1.0)
    assert consumer.reservations.refused == {reason: 1}
    with pytest.raises(TransferFailed, match="4 to 10"):
        consumer.reservations.complete(reservation.reservation_id, 1.0)
    consumer.reservations.landed(reservation.reservation_id, 4, 6, 1.0)
    consumer.scheduler.pool.release(consumer.reservations.complete(reservation.reservation_id, 1.0))
    with pytest.raises(TicketRefused, match=r"ended \(admitted\)"):
        consumer.reservations.complete(reservation.reservation_id, 1.0)
    consumer.assert_empty()


@pytest.mark.parametrize("stage", [RESERVED, CANCELLING])
def test_nothing_lands_outside_writing(consumer: Consumer, stage: ReservationStage) -> None:
    reservation = consumer.bring_to(stage)
    with pytest.raises(TicketRefused):
        consumer.reservations.landed(reservation.reservation_id, 0, 10, 1.0)
    with pytest.raises(TicketRefused):
        consumer.reservations.complete(reservation.reservation_id, 1.0)


def test_the_waiting_clock_frees_and_the_moving_clock_only_fails(consumer: Consumer) -> None:
    reservations = consumer.reservations
    waiting, moving, done = consumer.reserve("a"), consumer.reserve("b"), consumer.reserve("c")
    consumer.begin(moving, now_s=4.0)
    reservations.landed(moving.reservation_id, 0, 4, 8.0)
    assert reservations.next_expiry_s() == 5.0
    assert reservations.expire(4.9) == []
    assert reservations.expire(5.0) == [waiting.reservation_id, done.reservation_id]
    assert reservations.next_expiry_s() == 13.0, "progress renews the lease"
    held = consumer.scheduler.pool.num_held
    assert reservations.quarantined_blocks() == 0
    assert reservations.expire(13.0) == [moving.reservation_id]
    assert reservations.quarantined_blocks() == 3
    assert reservations.expire(1e9) == []
    assert consumer.scheduler.pool.num_held == held == 3, "however long it takes to be quiet"
    assert reservations.next_expiry_s() is None
    with pytest.raises(TicketRefused, match="cancelled"):
        reservations.landed(moving.reservation_id, 4, 6, 13.1)
    assert reservations.quiet(moving.reservation_id, 14.0)
    assert not reservations.quiet(moving.reservation_id, 14.0)
    consumer.assert_empty()


def test_a_lease_has_ended_whether_or_not_somebody_swept(consumer: Consumer) -> None:
    reservation = consumer.bring_to(WRITING)
    with pytest.raises(TicketRefused, match="lease ran out"):
        consumer.reservations.landed(reservation.reservation_id, 0, 10, 6.0)


def test_a_sign_of_life_renews_the_lease_of_a_writer_alone(consumer: Consumer) -> None:
    reservations, moving = consumer.reservations, consumer.bring_to(WRITING)
    reservations.renew(moving.reservation_id, 4.0)
    assert reservations.expire(8.9) == []
    with pytest.raises(TicketRefused, match="lease ran out"):
        reservations.renew(moving.reservation_id, 9.0)
    assert reservations.expire(9.0) == [moving.reservation_id]
    with pytest.raises(TicketRefused, match="cancelled"):
        reservations.renew(moving.reservation_id, 9.1)
    with pytest.raises(TicketRefused, match="not begun"):
        reservations.renew(consumer.reserve("b", now_s=9.0).reservation_id, 9.1)


def test_no_lease_outlives_the_request(consumer: Consumer) -> None:
    reservation = consumer.reserve(deadline_s=3.0)
    consumer.begin(reservation, now_s=2.5)
    assert consumer.reservations.next_expiry_s() == 3.0
    assert consumer.reservations.expire(3.0) == [reservation.reservation_id]


def test_what_cannot_be_reserved_takes_nothing(consumer: Consumer) -> None:
    with pytest.raises(ContextTooLong, match="40"):
        consumer.reserve(tokens=tuple(range(40)))
    consumer.reserve("all", tokens=tuple(range(39)))
    with pytest.raises(OutOfBlocks):
        consumer.reserve("more")
    consumer.reserve("two", tokens=(1, 2, 3, 4, 5))
    with pytest.raises(OutOfBlocks):
        consumer.reserve("one", tokens=(7,))
    consumer.check()
    assert consumer.reservations.counts()["reserved_blocks"] == 12


def test_a_refused_reservation_lets_go_of_the_prefix_it_found(consumer: Consumer) -> None:
    first = consumer.reserve("a")
    consumer.begin(first)
    consumer.reservations.landed(first.reservation_id, 0, 10, 1.0)
    consumer.scheduler.pool.release(consumer.reservations.complete(first.reservation_id, 1.0))
    blocker = consumer.scheduler.pool.allocate(9)
    with pytest.raises(OutOfBlocks):
        consumer.reserve("b", (*PROMPT[:8], *range(20, 30)))
    consumer.scheduler.pool.release(blocker)
    consumer.assert_empty()


def test_at_most_so_many_hand_overs_at_once(consumer: Consumer) -> None:
    for name in "abc":
        consumer.reserve(name, (1, 2))
    with pytest.raises(OutOfBlocks, match="3 hand-overs"):
        consumer.reserve("d", (1, 2))


def test_only_so_many_tombstones_are_kept_and_the_forgotten_are_refused_too() -> None:
    consumer = Consumer(tombstones=2)
    ended = []
    for number in range(5):
        ended.append(consumer.reserve(f"s{number}"))
        assert consumer.reservations.fail(ended[-1].reservation_id, "given up", 0.0)
        consumer.check()
    for reservation, reason in zip(ended, ["unknown"] * 3 + ["ended"] * 2, strict=True):
        with pytest.raises(TicketRefused, match=reason):
            consumer.begin(reservation)
    assert consumer.reservations.totals()["refused"] == 5


@pytest.mark.parametrize(
    "changes", [{"lease_s": 0.0}, {"max_reservations": 0}, {"tombstones": 0}, {"lease_s": float("nan")}]
)
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfiguration):
        dataclasses.replace(HandoffConfig(3, 40), **changes)
