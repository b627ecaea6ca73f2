"""The engine under the scheduler that serves, driven as worker/loop.py drives it: one thread, every part timed."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Sequence as Many

from engine.engine import Engine, EngineOptions
from engine.model_base import ModelFiles
from scheduler.batch import Event, Scheduler, SchedulerConfig
from scheduler.sequence import Sequence
from spec.sampling import SamplingParams, Speculation


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    num_sequences: int
    num_tokens: int  # computed, those of prompts included
    plan_s: float
    execute_s: float
    commit_s: float
    events: Many[Event]

    @property
    def scheduler_s(self) -> float:
        return self.plan_s + self.commit_s

    @property
    def total_s(self) -> float:
        return self.scheduler_s + self.execute_s


class TimedLoop:
    """Blocks suffice for `max_sequences` of `max_tokens` each."""

    def __init__(
        self,
        files: ModelFiles,
        options: EngineOptions,
        *,
        max_sequences: int,
        max_tokens: int,
        max_step_tokens: int,
        prefix_caching: bool = False,
    ) -> None:
        # Beside its own blocks each running sequence keeps a quarter block free for its neighbours to grow into.
        num_blocks = max_sequences * (-(-max_tokens // options.block_tokens) + 1)
        self.engine = Engine(files, options, num_blocks)
        self.engine.warm_up()
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_tokens=options.block_tokens,
                max_step_tokens=max_step_tokens,
                max_sequences=max_sequences,
                max_context_tokens=min(max_tokens, files.spec.max_context_tokens),
                prefix_caching=prefix_caching,
            )
        )
        self._names = itertools.count()

    def add(self, prompt: Many[int], num_tokens: int, speculation: Speculation | None = None) -> str:
        """A greedy request that ends after `num_tokens`, never before. Returns its sequence id."""
        name = str(next(self._names))
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True, speculation=speculation)
        self.scheduler.add(Sequence(name, tuple(prompt), [], params), time.monotonic())
        return name

    def step(self) -> Step | None:
        """None: nothing is left to compute."""
        started_s = time.perf_counter()
        now_s = time.monotonic()
        expired = self.scheduler.expire(now_s)
        assert not expired
        plan = self.scheduler.plan(now_s)
        planned_s = time.perf_counter()
        if plan is None:
            return None
        result = self.engine.execute(plan)
        executed_s = time.perf_counter()
        events = self.scheduler.commit(plan, result, time.monotonic())
        committed_s = time.perf_counter()
        return Step(
            num_sequences=len(plan.slices),
            num_tokens=plan.num_tokens,
            plan_s=planned_s - started_s,
            execute_s=executed_s - planned_s,
            commit_s=committed_s - executed_s,
            events=events,
        )
