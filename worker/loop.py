"""The engine loop: plan, execute, commit, deliver; one thread, which owns the device.

Everything that decides (scheduler, reservations) is guarded by `lock`. The loop holds it to plan and to commit, never
while a step is computed, so that a request is admitted or a reservation taken in microseconds while a step runs.

A failed request never stops the loop: it is an event. An exception out of the executor or the scheduler is a failed
invariant or a broken device: the loop ends, `failure` is set, `on_failure` is called, and the worker stops serving.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from scheduler.batch import Event, Scheduler
from scheduler.plan import Executor
from service import logs

logger = logs.get(__name__)

IDLE_WAIT_S = 0.25  # how often an idle loop looks whether something expired


class EngineLoop:
    """`deliver(events)` and `tick(now_s)` are called in the loop's thread, `tick` before each plan under the lock."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        deliver: Callable[[Sequence[Event]], None],
        on_failure: Callable[[BaseException], None],
        tick: Callable[[float], None] = lambda now_s: None,
    ) -> None:
        self.scheduler = scheduler
        self.lock = threading.RLock()
        self.failure: BaseException | None = None
        self.steps = 0
        self.busy_s = 0.0
        self._executor = executor
        self._deliver = deliver
        self._on_failure = on_failure
        self._tick = tick
        self._work = threading.Condition(self.lock)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """There is something new to plan."""
        with self._work:
            self._work.notify()

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
                self._step()
        except BaseException as failure:
            self.failure = failure
            logger.exception("the engine loop failed")
            self._on_failure(failure)

    def _step(self) -> None:
        with self._work:
            now_s = time.monotonic()
            self._tick(now_s)
            events = self.scheduler.expire(now_s)
            plan = self.scheduler.plan(now_s)
            if plan is None and not events and not self._stopping:
                self._work.wait(IDLE_WAIT_S)
        if events:
            self._deliver(events)
        if plan is None:
            return
        started_s = time.monotonic()
        result = self._executor.execute(plan)
        with self.lock:
            now_s = time.monotonic()
            events = self.scheduler.commit(plan, result, now_s)
        self.steps += 1
        self.busy_s += now_s - started_s
        self._deliver(events)
