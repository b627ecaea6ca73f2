"""Lanes: a sequence, its blocks and its reservations stay in one of them, and together they count as one worker."""

from __future__ import annotations

import random
from typing import Any

import pytest

from scheduler.batch import Failed, SchedulerConfig, Tokens
from scheduler.handoff import HandoffConfig
from scheduler.plan import Drawn, StepPlan, StepResult
from scheduler.sequence import Sequence
from spec.errors import InvalidParameter, TicketRefused
from spec.sampling import SamplingParams
from worker.lanes import LaneReservations, Lanes


def lanes_of(groups: int, **changes: Any) -> Lanes:
    values = {"num_blocks": 24, "block_tokens": 4, "max_step_tokens": 16, "max_sequences": 4, "max_context_tokens": 60}
    return Lanes.of(SchedulerConfig(**(values | changes), group=group) for group in range(groups))


def sequence(name: str, length: int = 9, max_tokens: int = 3, seed: int | None = None) -> Sequence:
    draw = random.Random(name if seed is None else seed)
    prompt = tuple(draw.randrange(50) for _ in range(length))
    return Sequence(name, prompt, [], SamplingParams(max_tokens=max_tokens, ignore_eos=True))


def result_of(plan: StepPlan) -> StepResult:
    drawn = tuple(() if piece.draw is None else (Drawn(len(piece.sequence_id)),) for piece in plan.slices)
    return StepResult(drawn, ((),) * len(plan.slices))


def step(lanes: Lanes) -> list[set[str]]:
    """Who is in which lane's plan."""
    plans = lanes.plan(1.0)
    if plans is None:
        return []
    lanes.commit(plans, [result_of(plan) for plan in plans], 1.0)
    lanes.check()
    return [{piece.sequence_id for piece in plan.slices} for plan in plans]


def test_new_ones_go_where_the_least_is_to_be_computed() -> None:
    lanes = lanes_of(3)
    for name, length in (("a", 30), ("b", 5), ("c", 9), ("d", 3)):
        lanes.add(sequence(name, length), 0.0)
    assert step(lanes) == [{"a"}, {"b", "d"}, {"c"}]


def test_a_lane_without_work_takes_part_with_nothing() -> None:
    lanes = lanes_of(2)
    lanes.add(sequence("a"), 0.0)
    assert step(lanes) == [{"a"}, set()]
    assert lanes.totals()["steps"] == 1


def test_who_shares_a_prefix_goes_where_it_is() -> None:
    lanes = lanes_of(2, num_blocks=64)
    lanes.add(sequence("first", 5), 0.0)
    lanes.add(sequence("long", 40, seed=3), 0.0)
    while step(lanes):
        pass
    lanes.add(sequence("like long", 41, seed=3), 0.0)
    assert [{"like long"} <= each for each in step(lanes)] == [False, True]
    assert lanes.totals()["cached_tokens"] == 40


def test_where_there_is_no_room_nobody_goes() -> None:
    lanes = lanes_of(2, num_blocks=12)
    lanes.add(sequence("wide", 40, max_tokens=9), 0.0)
    step(lanes)
    lanes.add(sequence("a", 30), 0.0)
    lanes.add(sequence("b", 4), 0.0)
    assert step(lanes)[1] >= {"a"}


def test_an_id_is_taken_in_all_lanes() -> None:
    lanes = lanes_of(2)
    lanes.add(sequence("a"), 0.0)
    with pytest.raises(InvalidParameter, match="runs here already"):
        lanes.add(sequence("a"), 0.0)


def test_all_come_to_their_end_and_the_sums_are_of_all_lanes() -> None:
    lanes = lanes_of(3)
    names = [f"s{number}" for number in range(14)]
    for name in names:
        lanes.add(sequence(name, 3 + len(name) % 5), 0.0)
    assert lanes.load().waiting == 14
    assert lanes.abort("s3", 0.0)
    assert not lanes.abort("unknown", 0.0)
    tokens: dict[str, int] = {}
    while (plans := lanes.plan(1.0)) is not None:
        for event in lanes.commit(plans, [result_of(plan) for plan in plans], 1.0):
            assert not isinstance(event, Failed)
            if isinstance(event, Tokens):
                tokens[event.sequence_id] = tokens.get(event.sequence_id, 0) + 1
        lanes.check()
    assert tokens == dict.fromkeys([name for name in names if name != "s3"], 3)
    assert set(lanes.counts().values()) == {0}
    assert lanes.totals()["finished"] == 13
    assert lanes.load().free_blocks == lanes.load().total_blocks == 3 * 24


def test_a_reservation_is_of_one_lane_and_so_is_what_is_adopted() -> None:
    lanes = lanes_of(2)
    reservations = LaneReservations(lanes, lambda group: HandoffConfig(4, 60, group=group), "decode-0/5")
    lanes.add(sequence("busy", 20), 0.0)
    tokens = list(range(11))
    found = reservations.reserve("a", tokens, producer_id="p", producer_epoch=1, deadline_s=99.0, now_s=0.0)
    assert found.group == 1
    assert reservations.reserved_blocks() == 3
    told = {"sequence_id": "a", "producer_id": "p", "producer_epoch": 1, "now_s": 0.0}
    reservations.begin(found.reservation_id, block_ids=found.block_ids, generations=found.generations, **told)
    reservations.landed(found.reservation_id, 0, 11, 0.0)
    block_table = reservations.complete(found.reservation_id, 0.0)
    adopted = Sequence("a", tuple(tokens), [7], SamplingParams(max_tokens=4, ignore_eos=True))
    lanes.adopt(adopted, block_table, 11, 0.0, group=found.group)
    assert step(lanes) == [{"busy"}, {"a"}]
    assert set(reservations.counts().values()) == {0}
    reservations.check()


@pytest.mark.parametrize("reservation_id", ["", "x", "decode-0/5/7/1", "decode-0/5/1/99"])
def test_a_reservation_of_no_lane_is_refused(reservation_id: str) -> None:
    reservations = LaneReservations(lanes_of(2), lambda group: HandoffConfig(4, 60, group=group), "decode-0/5")
    with pytest.raises(TicketRefused, match="unknown"):
        reservations.renew(reservation_id, 0.0)
    assert not reservations.quiet(reservation_id, 0.0)
