"""Who carries a step out: the engine of this process alone, or all ranks of the worker in one order."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from engine.engine import Engine
from engine.speculation import DraftModel
from legato.v1 import rank_pb2
from scheduler.plan import Slice, StepPlan, StepResult
from service import logs
from spec.errors import WorkerLost
from spec.shard import RankShard
from worker.meter import Meter
from worker.rank_messages import PlanWriter, result_from_message
from worker.ranks import Ranks
from worker.stage_times import StageTimes
from worker.watch import StepWatch

logger = logs.get(__name__)


def _nothing() -> None:
    return


FIRST_REPLICATION_STEP = 256  # then each time after eight times as many: nothing is computed meanwhile


class StepExecutor(Protocol):
    """Who carries steps out, as the loop sees it. A step is one plan for each group, without slices where a group has
    nothing to do."""

    steps_out: int  # so many steps may be submitted before the first one's result is taken

    def submit(
        self, plans: Sequence[StepPlan], watch: StepWatch | None = None, meanwhile: Callable[[], None] = _nothing
    ) -> None:
        """`watch` hears which layers have written; `meanwhile()`: see Engine. Raises what the worker is lost for."""
        ...

    def prepare(self, slices: tuple[Slice, ...]) -> None:
        """Called `meanwhile`, with those of the first group: see Engine."""
        ...

    def result(self) -> Sequence[StepResult]:
        """Of the oldest step whose result was not taken, in the order of its plans. Raises as submit() does."""
        ...

    def totals(self) -> dict[str, int]:
        """What only grows, of its own."""
        ...


class OneRank:
    """The engine, counted. A step is carried out while it is submitted."""

    steps_out = 1

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine, self._meter = engine, meter
        self._results: collections.deque[StepResult] = collections.deque()

    def submit(
        self, plans: Sequence[StepPlan], watch: StepWatch | None = None, meanwhile: Callable[[], None] = _nothing
    ) -> None:
        (plan,) = plans
        started_s = time.monotonic()
        result = self._engine.execute(plan, None if watch is None else watch.hook(0), meanwhile)
        self._meter.step(plans, (result,), time.monotonic() - started_s)
        self._results.append(result)

    def prepare(self, slices: tuple[Slice, ...]) -> None:
        self._engine.prepare(slices)

    def result(self) -> tuple[StepResult, ...]:
        return (self._results.popleft(),)

    def totals(self) -> dict[str, int]:
        return {}


class AllRanks:
    """Every rank executes the same steps in one order, each its group's plan. `steps_out` of them may be on their way
    through the stages; rank 0 carries out its own part of a step while it is submitted. A draft model is rank 0's
    alone: it guesses before the others are told."""

    def __init__(
        self,
        engine: Engine,
        ranks: Ranks,
        shards: Sequence[RankShard],
        steps_out: int,
        meter: Meter,
        draft_model: DraftModel | None,
        stages: StageTimes,
        expert_replicas: int = 0,
    ) -> None:
        self.steps_out = steps_out
        self._engine, self._ranks, self._meter = engine, ranks, meter
        self._draft_model, self._stages = draft_model, stages
        self._writer = PlanWriter()
        self._expert_replicas, self._replication_step = expert_replicas, FIRST_REPLICATION_STEP
        self._steps = 0  # submitted
        self._watches: dict[int, StepWatch] = {}  # of steps that are out, by number
        ranks.on_written = self._written
        self._out: collections.deque[tuple[Sequence[StepPlan], StepResult, float]] = collections.deque()
        layout = shards[0].layout
        self._members = [
            tuple(shard.rank for shard in shards if shard.group == group and shard.rank) for group in range(layout.dp)
        ]
        # Of each group the rank that draws.
        self._drawing = [
            next(s.rank for s in shards if s.group == group and s.is_last_stage and s.index == 0)
            for group in range(layout.dp)
        ]
        self._silent = [shard.rank for shard in shards if shard.rank and shard.rank not in self._drawing]
        self._stage_of = [shard.stage for shard in shards]
        self._stage_ranks = layout.stage_ranks

    def submit(
        self, plans: Sequence[StepPlan], watch: StepWatch | None = None, meanwhile: Callable[[], None] = _nothing
    ) -> None:
        """Raises what the worker is lost for."""
        if self._expert_replicas and self._steps == self._replication_step:
            self._replicate_experts()
        started_s = time.monotonic()
        guessed = [self._with_guesses(plan) for plan in plans]
        if watch is not None:
            self._watches[self._steps] = watch
        for group, (plan, members) in enumerate(zip(guessed, self._members, strict=True)):
            if members:
                ends = () if watch is None else watch.ends.get(group, ())
                command = rank_pb2.RankCommand(execute=self._writer.write(self._steps, plan, ends))
                self._ranks.send_bytes(members, command.SerializeToString())
        self._steps += 1
        self._stages.submitted()
        executing_s = time.monotonic()
        try:
            result = self._engine.execute(guessed[0], None if watch is None else watch.hook(0), meanwhile)
        except WorkerLost as error:
            raise self._ranks.cause(error) from None
        self._busy(0, time.monotonic() - executing_s)
        self._out.append((plans, result, started_s))

    def prepare(self, slices: tuple[Slice, ...]) -> None:
        self._engine.prepare(slices)

    def _replicate_experts(self) -> None:
        """Commands are carried out in order: on every rank it is done between the same two steps."""
        self._replication_step *= 8
        command = rank_pb2.RankCommand(replicate=rank_pb2.RankCommand.Replicate(copies=self._expert_replicas))
        started_s = time.monotonic()
        self._ranks.send_all(command)
        try:
            before, after = self._engine.replicate_experts(self._expert_replicas)
        except WorkerLost as error:
            raise self._ranks.cause(error) from None
        self._ranks.wait_ready()
        self._meter.experts_placed(before, after)
        logger.info(
            "experts are placed by their load: the busiest part has %.2f times the mean's, and had %.2f; took %.1f s",
            *(after, before, time.monotonic() - started_s),
        )

    def _with_guesses(self, plan: StepPlan) -> StepPlan:
        if self._draft_model is None:
            return plan
        return dataclasses.replace(plan, slices=self._draft_model.guess(plan.slices))

    def result(self) -> tuple[StepResult, ...]:
        """Raises what the worker is lost for."""
        plans, own, started_s = self._out.popleft()
        results = tuple(own if rank == 0 else result_from_message(self._heard(rank)) for rank in self._drawing)
        for rank in self._silent:  # so that none falls behind for ever
            self._heard(rank)
        self._watches.pop(self._steps - len(self._out) - 1, None)
        self._stages.taken(is_last=not self._out)
        self._meter.step(plans, results, time.monotonic() - started_s)
        return results

    def _written(self, rank: int, step: int, end: int) -> None:
        """In the thread that reads what ranks report. What comes after the step's result is told by that."""
        if (watch := self._watches.get(step)) is not None:
            watch.written(rank, end)

    def _heard(self, rank: int) -> rank_pb2.RankResult:
        message = self._ranks.result(rank)
        self._busy(rank, message.busy_s)
        return message

    def _busy(self, rank: int, seconds: float) -> None:
        self._stages.busy(self._stage_of[rank], seconds / self._stage_ranks)

    def totals(self) -> dict[str, int]:
        """The time of each stage; see StageTimes."""
        return self._stages.totals()
