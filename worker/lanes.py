"""The groups of a worker (among dp), each with a scheduler and reservations of its own: their lanes, and one front.

A sequence lives in the lane where it was placed, and so do its blocks; their ids are the lane's. A step is one plan a
lane, without slices where a lane has nothing to do, for all ranks execute every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Self

from scheduler.ahead import AheadPlan
from scheduler.batch import Scheduler, SchedulerConfig
from scheduler.config import Load
from scheduler.events import Event
from scheduler.handoff import HandoffConfig, Reservation, Reservations
from scheduler.plan import StepPlan, StepResult
from scheduler.sequence import Sequence as Running

AheadPlans = tuple[AheadPlan | None, ...]  # by lane; None: it has nothing to do


class Lanes:
    """As one Scheduler, to those who add sequences and to the loop."""

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        assert [scheduler.config.group for scheduler in schedulers] == list(range(len(schedulers)))
        self.schedulers = tuple(schedulers)
        self._steps = 0

    @classmethod
    def of(cls, configs: Iterable[SchedulerConfig]) -> Self:
        return cls([Scheduler(config) for config in configs])

    def _of(self, sequence_id: str) -> Scheduler | None:
        return next((each for each in self.schedulers if each.has(sequence_id)), None)

    def add(self, sequence: Running, now_s: float) -> None:
        """Raises as Scheduler.add() does."""
        lane = self.schedulers[0]
        if len(self.schedulers) > 1:
            known = sequence.tokens(0, sequence.known_tokens)
            lane = self._of(sequence.sequence_id) or self.lightest(known, sequence.adapter)
        lane.add(sequence, now_s)

    def adopt(
        self, sequence: Running, block_table: Iterable[int], computed_tokens: int, now_s: float, *, group: int = 0
    ) -> None:
        """Raises as Scheduler.adopt() does. `group`: whose blocks they are."""
        self.schedulers[group].adopt(sequence, block_table, computed_tokens, now_s)

    def abort(self, sequence_id: str, now_s: float) -> bool:
        lane = self._of(sequence_id)
        return lane is not None and lane.abort(sequence_id, now_s)

    def find(self, sequence_id: str) -> tuple[int, Running] | None:
        """(Its group, the sequence), to be read. None: it is not here (any more)."""
        lane = self._of(sequence_id)
        sequence = None if lane is None else lane.sequence(sequence_id)
        return None if lane is None or sequence is None else (lane.config.group, sequence)

    def take_out(self, sequence_id: str) -> bool:
        """As Scheduler.take_out() does."""
        lane = self._of(sequence_id)
        return lane is not None and lane.take_out(sequence_id)

    def put_back(self, sequence_id: str) -> None:
        if (lane := self._of(sequence_id)) is not None:
            lane.put_back(sequence_id)

    def release(self, sequence_id: str) -> None:
        if (lane := self._of(sequence_id)) is not None:
            lane.release(sequence_id)

    def hold(self, group: int, blocks: Sequence[int]) -> None:
        self.schedulers[group].pool.hold(blocks)

    def unhold(self, group: int, blocks: Sequence[int]) -> None:
        self.schedulers[group].pool.release(blocks)

    def lightest(self, token_ids: Sequence[int], adapter: str) -> Scheduler:
        """Where these tokens are computed soonest: those that have room now first, then the fewest tokens to compute,
        what waits there before them included and what a prefix cache holds of them left out."""
        hashes = self.schedulers[0].prefix.hashes(token_ids, adapter)

        def cost(lane: Scheduler) -> tuple[bool, int, int]:
            load, size = lane.load(), lane.config.block_tokens
            cached = lane.prefix.count(hashes[: max(len(token_ids) - 1, 0) // size])
            missing = lane.pool.blocks_for(len(token_ids)) - cached
            to_compute = load.waiting_tokens + len(token_ids) - cached * size
            return missing > load.free_blocks, to_compute, load.running + load.held

        return min(self.schedulers, key=cost)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> tuple[StepPlan, ...] | None:
        """One plan a lane. None: no lane can compute anything before something else happens."""
        if len(self.schedulers) == 1:
            plan = self.schedulers[0].plan(now_s)
            return None if plan is None else (plan,)
        plans = [scheduler.plan(now_s) for scheduler in self.schedulers]
        if not any(plans):
            return None
        return tuple(StepPlan(0, ()) if plan is None else plan for plan in plans)

    def plan_ahead(self, now_s: float) -> AheadPlans | None:
        """As Scheduler.plan_ahead() does, of every lane that has something to do. None where one of these has none."""
        idle = [scheduler.has_nothing_to_plan(now_s) for scheduler in self.schedulers]
        if all(idle):
            return None
        found: list[AheadPlan | None] = []
        for scheduler, does_nothing in zip(self.schedulers, idle, strict=True):
            ahead = None if does_nothing else scheduler.plan_ahead()
            if ahead is None and not does_nothing:
                return None
            found.append(ahead)
        return tuple(found)

    def follow(
        self, ahead: AheadPlans, results: Sequence[StepResult], now_s: float, drawn_s: float
    ) -> tuple[StepPlan, ...] | None:
        """As Scheduler.follow() does, where what was made ahead holds in every lane. None: nothing has changed."""
        each = list(zip(self.schedulers, ahead, results, strict=True))
        for lane, made, result in each:
            if not (lane.has_nothing_to_plan(now_s) if made is None else lane.holds(made, result, now_s)):
                return None
        return tuple(
            StepPlan(0, ()) if made is None else lane.follow(made, result, drawn_s) for lane, made, result in each
        )

    def commit(self, plans: Sequence[StepPlan], results: Sequence[StepResult], now_s: float) -> list[Event]:
        events: list[Event] = []
        for scheduler, plan, result in zip(self.schedulers, plans, results, strict=True):
            if plan.slices:
                events += scheduler.commit(plan, result, now_s)
        self._steps += 1
        return events

    def expire(self, now_s: float) -> list[Event]:
        return [event for scheduler in self.schedulers for event in scheduler.expire(now_s)]

    def next_deadline_s(self) -> float | None:
        return _soonest(scheduler.next_deadline_s() for scheduler in self.schedulers)

    # ---- what is counted -------------------------------------------------------------------------------------------

    def load(self) -> Load:
        loads = [scheduler.load() for scheduler in self.schedulers]
        if len(loads) == 1:
            return loads[0]
        return Load(
            waiting=sum(load.waiting for load in loads),
            running=sum(load.running for load in loads),
            held=sum(load.held for load in loads),
            waiting_tokens=sum(load.waiting_tokens for load in loads),
            free_blocks=sum(load.free_blocks for load in loads),
            total_blocks=sum(load.total_blocks for load in loads),
        )

    def counts(self) -> dict[str, int]:
        return _sum(scheduler.counts() for scheduler in self.schedulers)

    def totals(self) -> dict[str, int]:
        """`steps` are those of the worker, in which each lane may have had a part."""
        return _sum(scheduler.totals() for scheduler in self.schedulers) | {"steps": self._steps}

    def check(self) -> None:
        for scheduler in self.schedulers:
            scheduler.check()


class LaneReservations:
    """As one Reservations, to those who reserve and to writers. A reservation's id says whose it is."""

    def __init__(self, lanes: Lanes, config: Callable[[int], HandoffConfig], consumer: str) -> None:
        """`config(group)`; `consumer` names the worker in this life."""
        self._lanes = lanes
        self._each = tuple(
            Reservations(
                scheduler.pool,
                scheduler.prefix,
                config(group),
                consumer=_consumer(consumer, group),
                spare_blocks=scheduler.spare_blocks,
            )
            for group, scheduler in enumerate(lanes.schedulers)
        )
        self._by_consumer = {_consumer(consumer, group): each for group, each in enumerate(self._each)}

    def _of(self, reservation_id: str) -> Reservations:
        """One that is of no lane is refused by the first, as unknown."""
        return self._by_consumer.get(reservation_id.rpartition("/")[0], self._each[0])

    def reserve(
        self,
        sequence_id: str,
        token_ids: Sequence[int],
        *,
        producer_id: str,
        producer_epoch: int,
        deadline_s: float,
        now_s: float,
        adapter: str = "",
    ) -> Reservation:
        lane = self._each[0]
        if len(self._each) > 1:
            lane = self._each[self._lanes.lightest(token_ids, adapter).config.group]
        return lane.reserve(
            sequence_id,
            token_ids,
            producer_id=producer_id,
            producer_epoch=producer_epoch,
            deadline_s=deadline_s,
            now_s=now_s,
            adapter=adapter,
        )

    def begin(
        self,
        reservation_id: str,
        *,
        sequence_id: str,
        producer_id: str,
        producer_epoch: int,
        block_ids: Sequence[int],
        generations: Sequence[int],
        now_s: float,
    ) -> None:
        self._of(reservation_id).begin(
            reservation_id,
            sequence_id=sequence_id,
            producer_id=producer_id,
            producer_epoch=producer_epoch,
            block_ids=block_ids,
            generations=generations,
            now_s=now_s,
        )

    def renew(self, reservation_id: str, now_s: float) -> None:
        self._of(reservation_id).renew(reservation_id, now_s)

    def landed(self, reservation_id: str, first_token: int, num_tokens: int, now_s: float) -> None:
        self._of(reservation_id).landed(reservation_id, first_token, num_tokens, now_s)

    def settled(self, reservation_id: str, first_token: int, num_tokens: int) -> None:
        self._of(reservation_id).settled(reservation_id, first_token, num_tokens)

    def complete(self, reservation_id: str, now_s: float) -> tuple[int, ...]:
        return self._of(reservation_id).complete(reservation_id, now_s)

    def was_admitted(self, reservation_id: str) -> bool:
        return self._of(reservation_id).was_admitted(reservation_id)

    def fail(self, reservation_id: str, reason: str, now_s: float) -> bool:
        return self._of(reservation_id).fail(reservation_id, reason, now_s)

    def quiet(self, reservation_id: str, now_s: float) -> bool:
        return self._of(reservation_id).quiet(reservation_id, now_s)

    def expire(self, now_s: float) -> list[str]:
        return [reservation_id for each in self._each for reservation_id in each.expire(now_s)]

    def next_expiry_s(self) -> float | None:
        return _soonest(each.next_expiry_s() for each in self._each)

    def reserved_blocks(self) -> int:
        return sum(each.reserved_blocks() for each in self._each)

    def quarantined_blocks(self) -> int:
        return sum(each.quarantined_blocks() for each in self._each)

    def counts(self) -> dict[str, int]:
        return _sum(each.counts() for each in self._each)

    def totals(self) -> dict[str, int]:
        return _sum(each.totals() for each in self._each)

    def check(self) -> None:
        for each in self._each:
            each.check()


def _consumer(consumer: str, group: int) -> str:
    return f"{consumer}/{group}"


def _soonest(times: Iterable[float | None]) -> float | None:
    return min((at_s for at_s in times if at_s is not None), default=None)


def _sum(each: Iterable[dict[str, int]]) -> dict[str, int]:
    """Of counts of the same names."""
    found: dict[str, int] = {}
    for counts in each:
        found = {name: found.get(name, 0) + count for name, count in counts.items()} if found else counts
    return found
