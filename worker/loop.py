"""The engine loop: plan, submit, take the result, commit; one thread, which owns the device.

    one stage       plan 0, result 0, commit 0, plan 1, result 1, ...
    all go on       plan 0 (plan 1 ahead), result 0, follow 1 (commit 0, plan 2 ahead), result 1, follow 2, ...
    two stages      plan 0, plan 1, result 0, commit 0, plan 2, result 1, ...      `executor.steps_out` are out at once

What is in brackets is done while the step is computed. Where a plan that was made ahead does not hold, as
scheduler/ahead.py decides, the step behind which it was made is committed, and the next one planned anew.

What came of a step is delivered while the next one is computed, by a thread of its own: between two steps Python's lock
would go to whoever makes messages of it, and come back when these are made. Where no step follows it is delivered at
once; no step is planned before all but the last one's is delivered.

Everything that decides (scheduler, reservations) is guarded by `lock`. The loop holds it to plan and to commit, never
while a step is computed, so that a request is admitted or a reservation taken in microseconds while a step runs.

A failed request never stops the loop: it is an event. An exception out of the executor or the scheduler is a failed
invariant, a broken device or a lost rank: the loop ends, `failure` is set, `on_failure` is called, and the worker stops
serving.
"""

from __future__ import annotations

import collections
import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence

from scheduler.events import Event, Failed
from scheduler.plan import StepPlan, StepResult
from service import logs
from spec.errors import InternalError, WorkerLost
from worker.executor import StepExecutor
from worker.lanes import AheadPlans, Lanes
from worker.watch import StepWatch

logger = logs.get(__name__)


LONGEST_WAIT_S = 1.0  # whoever forgets to wake the loop costs a request this much at most


class EngineLoop:
    """`tick(now_s)` and `begin(plans)` are called in the loop's thread under the lock. `tick`, before each plan, says
    when it is due next, None for not before something wakes the loop; `begin`, after it, who hears which layers have
    written while it is carried out. `deliver(events)` is called in another thread, in the order of the steps."""

    def __init__(
        self,
        scheduler: Lanes,
        executor: StepExecutor,
        deliver: Callable[[Sequence[Event]], None],
        on_failure: Callable[[BaseException], None],
        tick: Callable[[float], float | None] = lambda now_s: None,
        begin: Callable[[Sequence[StepPlan]], StepWatch | None] = lambda plans: None,
    ) -> None:
        self.scheduler = scheduler
        self.lock = threading.RLock()
        self.failure: BaseException | None = None
        self._executor = executor
        self._out: collections.deque[tuple[StepPlan, ...]] = collections.deque()  # submitted, result not taken
        self._taken: tuple[tuple[StepPlan, ...], Sequence[StepResult], float] | None = None  # and when; to be committed
        self._ahead: AheadPlans | None = None  # behind the newest step that is out
        self._deliver = deliver
        self._untold: list[Event] = []  # told while the next step is computed
        self._on_failure = on_failure
        self._tick = tick
        self._begin = begin
        self._calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()  # None: nothing follows
        self._told = threading.Event()  # what was put there last has been delivered
        self._told.set()
        self._all_told = False
        self._undelivered: Exception | None = None
        self._work = threading.Condition(self.lock)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)
        self._teller = threading.Thread(target=self._deliver_all, name="engine-events", daemon=True)

    def start(self) -> None:
        self._teller.start()
        self._thread.start()

    def wake(self) -> None:
        """There is something new to plan."""
        with self._work:
            self._work.notify()

    def after_told(self, call: Callable[[], object]) -> None:
        """`call()` in the thread of `deliver`, behind everything that was committed up to now."""
        with self.lock:
            self._tell()
            if not self._all_told:
                self._calls.put(call)
                return
        call()

    def stop(self) -> None:
        """Ends after the step that runs now."""
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._told.wait()
                if self.begin_step():
                    self.end_step()
            self._commit()
        except BaseException as failure:
            self.failure = failure
            if not isinstance(failure, WorkerLost):
                logger.exception("the engine loop failed")
        with self.lock:
            self._tell()
            self._calls.put(None)
            self._all_told = True
        self._teller.join()  # tokens that were drawn reach their clients before anything of a failure does
        if self.failure is not None:
            self._on_failure(self.failure)

    def begin_step(self) -> bool:
        """Up to the submitting of a step, or until there may be something to do. True: a result is to be taken."""
        if self._undelivered is not None:
            raise self._undelivered
        with self._work:
            now_s = time.monotonic()
            due_s = self._tick(now_s)
            plans = self._follow(now_s)
            if plans is None:
                self._commit()
                self._untold += self.scheduler.expire(now_s)
                plans = self.scheduler.plan(now_s) if len(self._out) < self._executor.steps_out else None
            watch = None if plans is None else self._begin(plans)
            if plans is None and not self._out and not self._untold and not self._stopping:
                due = [at_s for at_s in (due_s, self.scheduler.next_deadline_s()) if at_s is not None]
                self._work.wait(max(0.0, min([now_s + LONGEST_WAIT_S, *due]) - now_s))
        if plans is None:
            self._tell()
        else:
            try:
                self._executor.submit(plans, watch, self._meanwhile)
            finally:
                self._commit()  # where submitting failed: what was drawn is told before that
            self._out.append(plans)
            if len(self._out) < self._executor.steps_out:
                return False
        return bool(self._out)

    def end_step(self) -> None:
        """Takes the oldest step's result."""
        results = self._executor.result()
        self._taken = self._out.popleft(), results, time.monotonic()

    def _follow(self, now_s: float) -> tuple[StepPlan, ...] | None:
        ahead, self._ahead = self._ahead, None
        if ahead is None or self._taken is None:
            return None
        _, results, taken_s = self._taken
        return self.scheduler.follow(ahead, results, now_s, taken_s)

    def _meanwhile(self) -> None:
        """When a step is under way."""
        with self.lock:
            self._commit()
            self._tell()
            self._ahead = self.scheduler.plan_ahead(time.monotonic())
        if self._ahead is not None and (own := self._ahead[0]) is not None:
            self._executor.prepare(own.slices)

    def _commit(self) -> None:
        """What was taken and is not committed yet."""
        with self.lock:
            if self._taken is not None:
                (plans, results, taken_s), self._taken = self._taken, None
                self._untold += self.scheduler.commit(plans, results, taken_s)

    def _tell(self) -> None:
        with self.lock:
            events, self._untold = self._untold, []
            if events:
                told = self._told = threading.Event()
                self._calls.put(functools.partial(self._deliver_to_end, events, told))

    def _deliver_to_end(self, events: Sequence[Event], told: threading.Event) -> None:
        for event in events:
            if isinstance(event, Failed) and isinstance(event.error, InternalError):
                logger.error("sequence %s failed: %s", event.sequence_id, event.error.message)
        try:
            self._deliver(events)
        finally:
            told.set()

    def _deliver_all(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                call()
            except Exception as error:
                self._undelivered = error
