"""The engine loop: what came of a step is told while the next one runs, held before it, and told before a failure."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from scheduler.batch import Event, SchedulerConfig, Tokens
from scheduler.plan import Drawn, Slice, StepPlan, StepResult
from scheduler.sequence import Sequence as Running
from spec.errors import WorkerLost
from spec.sampling import SamplingParams
from worker.lanes import Lanes
from worker.loop import EngineLoop
from worker.watch import StepWatch

PATIENCE_S = 10.0
LOST = WorkerLost("a rank is gone")


class ToyExecutor:
    """Draws token 7 wherever something is drawn. `during(step)` runs where a real one computes; `fails_at` is a step
    that is not begun."""

    def __init__(self, steps_out: int, during: Callable[[int], None]) -> None:
        self.steps_out, self._during, self._steps = steps_out, during, 0
        self.fails_at: int | None = None
        self.plans: list[StepPlan] = []
        self.prepared: tuple[Slice, ...] = ()
        self._results: collections.deque[list[StepResult]] = collections.deque()

    def submit(
        self, plans: Sequence[StepPlan], watch: StepWatch | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        if self._steps == self.fails_at:
            raise LOST
        self.plans += plans
        assert all(plan.ahead is None or plan.ahead is self.prepared for plan in plans)
        meanwhile()
        self._during(self._steps)
        self._steps += 1
        each = [
            StepResult(
                tuple(() if piece.draw is None else (Drawn(7),) for piece in plan.slices), ((),) * len(plan.slices)
            )
            for plan in plans
        ]
        self._results.append(each)

    def prepare(self, slices: tuple[Slice, ...]) -> None:
        self.prepared = slices

    def result(self) -> Sequence[StepResult]:
        return self._results.popleft()

    def totals(self) -> dict[str, int]:
        return {}


class Driven:
    """A loop on one lane, with everything that it tells in one list."""

    def __init__(self, during: Callable[[int], None] = lambda step: None, steps_out: int = 1) -> None:
        values: dict[str, Any] = {"num_blocks": 24, "block_tokens": 4, "max_step_tokens": 16, "max_sequences": 4}
        self.lanes = Lanes.of([SchedulerConfig(max_context_tokens=60, steps_out=steps_out, **values)])
        self.told: list[object] = []
        self.telling_s = 0.0
        self.begun: list[int] = []  # of each step how many were told when it was planned
        self.changed = threading.Condition()
        self.executor = ToyExecutor(steps_out, during)
        self.loop = EngineLoop(self.lanes, self.executor, self._deliver, self._note, lambda now_s: None, self._begin)

    def _begin(self, plans: Sequence[StepPlan]) -> None:
        self.begun.append(len(self.told))

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Tokens):
                time.sleep(self.telling_s)
                self._note(event.first_index)

    def _note(self, what: object) -> None:
        with self.changed:
            self.told.append(what)
            self.changed.notify_all()

    def wait_for(self, *what: object) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: all(each in self.told for each in what), PATIENCE_S)

    def start(self, max_tokens: int, names: str = "a") -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        for name in names:
            self.lanes.add(Running(name, (1, 2, 3), [], params), time.monotonic())
        self.loop.start()


@pytest.mark.parametrize("steps_out", [1, 2])
def test_all_is_told_in_order_and_at_once_where_nothing_follows(steps_out: int) -> None:
    driven = Driven(steps_out=steps_out)
    driven.start(max_tokens=9)
    assert driven.wait_for(8)
    driven.loop.stop()
    assert driven.told == list(range(9))


def test_a_step_is_told_while_the_next_one_runs() -> None:
    told_meanwhile = []

    def during(step: int) -> None:
        told_meanwhile.append(step == 0 or driven.wait_for(step - 1))

    driven = Driven(during)
    driven.start(max_tokens=4)
    assert driven.wait_for(3)
    driven.loop.stop()
    assert told_meanwhile == [True] * 4


def test_no_step_is_planned_before_all_but_the_last_is_told() -> None:
    driven = Driven()
    driven.telling_s = 0.02
    driven.start(max_tokens=9)
    assert driven.wait_for(8)
    driven.loop.stop()
    assert all(told >= step - 1 for step, told in enumerate(driven.begun))


def test_what_was_drawn_is_told_before_a_failure_is() -> None:
    def during(step: int) -> None:
        if step == 2:
            raise LOST

    driven = Driven(during)
    driven.start(max_tokens=9)
    assert driven.wait_for(LOST)
    assert driven.told == [0, 1, LOST]
    assert driven.loop.failure is LOST
    driven.loop.stop()


def test_what_was_drawn_is_told_though_the_next_step_does_not_begin() -> None:
    driven = Driven()
    driven.executor.fails_at = 3
    driven.start(max_tokens=9)
    assert driven.wait_for(LOST)
    assert driven.told == [0, 1, 2, LOST]
    driven.loop.stop()


def test_stopping_tells_what_is_left() -> None:
    reached, may_go_on = threading.Event(), threading.Event()

    def during(step: int) -> None:
        if step == 3:
            reached.set()
            may_go_on.wait(PATIENCE_S)

    driven = Driven(during)
    driven.start(max_tokens=9)
    assert reached.wait(PATIENCE_S)
    stopping = threading.Thread(target=driven.loop.stop)
    stopping.start()
    may_go_on.set()
    stopping.join()
    assert driven.told == list(range(len(driven.told)))
    assert len(driven.told) >= 4


def test_who_asks_hears_behind_all_that_was_committed() -> None:
    asked, may_go_on = threading.Event(), threading.Event()

    def during(step: int) -> None:
        if step == 3:
            asked.set()
            may_go_on.wait(PATIENCE_S)

    driven = Driven(during)
    driven.start(max_tokens=9)
    assert asked.wait(PATIENCE_S)
    driven.loop.after_told(lambda: driven._note("so far"))
    assert driven.wait_for("so far")
    may_go_on.set()
    assert driven.wait_for(8)
    assert driven.told == [0, 1, 2, "so far", 3, 4, 5, 6, 7, 8]
    driven.loop.stop()
    driven.loop.after_told(lambda: driven._note("after the end"))
    assert driven.told[-1] == "after the end"


@pytest.mark.parametrize("steps_out", [1, 2])
def test_steps_are_planned_ahead_where_one_is_out_at_once(steps_out: int) -> None:
    driven = Driven(steps_out=steps_out)
    driven.start(max_tokens=9)
    assert driven.wait_for(8)
    driven.loop.stop()
    made_ahead = [plan.ahead is not None for plan in driven.executor.plans]
    assert made_ahead == [False] + [steps_out == 1] * 8


def test_who_is_given_up_while_a_step_runs_is_not_in_the_next() -> None:
    """Though the next was planned ahead with it."""

    def during(step: int) -> None:
        if step == 3:
            with driven.loop.lock:
                assert driven.lanes.abort("b", time.monotonic())

    driven = Driven(during)
    driven.start(max_tokens=9, names="abc")
    assert driven.wait_for(8)
    driven.loop.stop()
    names = ["".join(piece.sequence_id for piece in plan.slices) for plan in driven.executor.plans]
    assert names == ["abc"] * 4 + ["ac"] * 5
    assert [plan.ahead is not None for plan in driven.executor.plans] == [False, *[True] * 3, False, *[True] * 4]
    assert driven.lanes.counts() == dict.fromkeys(driven.lanes.counts(), 0)
