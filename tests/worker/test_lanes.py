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


def drawn_by_place(plan: StepPlan) -> StepResult:
    """One token in 19 is the end."""
    drawn: list[tuple[Drawn, ...]] = []
    for piece in plan.slices:
        place = None if piece.draw is None else f"{piece.sequence_id} {piece.draw.position}"
        drawn.append(() if place is None else (Drawn(random.Random(place).randrange(19)),))
    return StepResult(tuple(drawn), ((),) * len(drawn))


class Pair:
    """Two of the same lanes, told the same: one commits and plans, the other follows where it can, then commits."""

    def __init__(self, seed: int, seen: dict[str, int]) -> None:
        self.draw, self.seen, self.now_s = random.Random(seed), seen, 0.0
        self.plain, self.ahead = (lanes_of(2, eos_token_ids=(3,)) for _ in range(2))
        self.names = [f"{seed}-{number}" for number in range(9)]
        self.events: tuple[list[Any], list[Any]] = ([], [])

    def come(self, chance: float) -> None:
        while self.names and self.draw.random() < chance:
            name, length, most = self.names.pop(), self.draw.randint(1, 20), self.draw.randint(1, 30)
            params, deadline_s = SamplingParams(max_tokens=most, ignore_eos=length % 2 == 0), self.now_s + 25.0
            for lanes in (self.plain, self.ahead):
                lanes.add(Sequence(name, tuple(range(length)), [], params, deadline_s), self.now_s)

    def run(self) -> None:
        self.come(0.8)
        plans = [lanes.plan(self.now_s) for lanes in (self.plain, self.ahead)]
        while plans[0] is not None:
            assert plans[1] == plans[0]
            self.now_s += 1.0
            plans = self.step(*plans)
            if plans[0] is None:
                self.come(0.9)
                plans = [lanes.plan(self.now_s) for lanes in (self.plain, self.ahead)]
        assert set(self.ahead.counts().values()) == {0}

    def step(self, plain_plans: Any, ahead_plans: Any) -> list[Any]:
        """What comes behind these."""
        plain, ahead, seen, now_s = self.plain, self.ahead, self.seen, self.now_s
        made = ahead.plan_ahead(now_s)
        self.come(0.1)
        results = [drawn_by_place(plan) for plan in plain_plans]
        self.events[0].extend(plain.commit(plain_plans, results, now_s))
        self.events[0].extend(plain.expire(now_s))
        following = None if made is None else ahead.follow(made, results, now_s, now_s)
        self.events[1].extend(ahead.commit(ahead_plans, results, now_s))
        if made is not None and following is not None:
            seen["followed"] += 1
            seen["with an idle lane"] += None in made
            seen["with both lanes"] += None not in made
            seen["without leavers"] += not all(all(each.stays) for each in made if each is not None)
        else:
            self.events[1].extend(ahead.expire(now_s))
            seen["dropped"] += made is not None
        seen["steps"] += 1
        found = [plain.plan(now_s), ahead.plan(now_s) if following is None else following]
        assert told(self.events[0]) == told(self.events[1])
        assert plain.totals() == ahead.totals()
        ahead.check()
        return found


def told(events: list[Any]) -> list[Any]:
    return [(e.sequence_id, e.error.message) if isinstance(e, Failed) else e for e in events]


def test_what_lanes_plan_ahead_is_what_they_plan_without() -> None:
    names = ("steps", "followed", "with an idle lane", "with both lanes", "without leavers", "dropped")
    seen = dict.fromkeys(names, 0)
    for seed in range(25):
        Pair(seed, seen).run()
    assert seen["followed"] > 0.4 * seen["steps"]
    assert min(seen.values()) > 0, seen
