"""A deterministic event loop: time is virtual, nothing waits, nothing runs beside it; and processes that live in it.

    nothing is ready       the clock jumps to the next timer
    run_in_executor        the work is done at once, a drawn moment later
    a simulated process    a name in the context of its tasks and timers: what is of a dead process never runs again,
                           what is of a stopped one waits until it goes on

Every callback knows its process by its context, which asyncio hands on from task to task. So a crash ends tasks where
they stand, as kill -9 does: no `finally` runs, nobody is told but by the network.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import random
import secrets
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

UNIX_AT_START_S = 1_790_000_000.0
MONOTONIC_AT_START_S = 1000.0
MOST_CANCELLATIONS = 100  # of a task that goes on in spite of them
EXECUTOR_DELAY_S = 0.0003  # on average, until a thread has done a piece of work

_process: contextvars.ContextVar[Process] = contextvars.ContextVar("simulated_process")


class Process:
    """One process of the simulated world."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.is_stopped = False
        self.context = contextvars.Context()
        self.context.run(_process.set, self)
        self.waiting: list[asyncio.Handle] = []  # what came due while it was stopped

    @staticmethod
    def current() -> Process:
        return _process.get()


class SimulatedLoop(asyncio.BaseEventLoop):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.now_s = MONOTONIC_AT_START_S
        self.callbacks = 0
        self._rng = rng
        self.tasks: list[asyncio.Task[Any]] = []  # held, so that those of dead processes are not collected and run on
        self._never_run: list[asyncio.Handle] = []  # of dead processes, held likewise
        self._is_over = False
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self.now_s

    def unix_ns(self) -> int:
        return int((UNIX_AT_START_S + self.now_s - MONOTONIC_AT_START_S) * 1e9)

    def spawn(self, process: Process, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        return self.create_task(work, name=name or None, context=process.context.copy())  # type: ignore[no-any-return]

    def go_on(self, process: Process) -> None:
        """A stopped process runs again: first all that came due meanwhile, in order."""
        process.is_stopped = False
        self._ready.extend(process.waiting)  # type: ignore[attr-defined]
        process.waiting.clear()

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(work, loop=loop, context=context)
        self.tasks.append(task)
        return task

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        if not ready:
            while scheduled and scheduled[0]._cancelled:
                heapq.heappop(scheduled)
            assert scheduled, "nothing is ready and no timer is set: whoever waits now waits for ever"
            self.now_s = max(self.now_s, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self.now_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            if not handle._cancelled:
                ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_process)
            if process is None or self._is_over or (process.is_alive and not process.is_stopped):
                self.callbacks += 1
                handle._run()
            elif process.is_alive:
                process.waiting.append(handle)
            else:
                self._never_run.append(handle)

    def _write_to_self(self) -> None:
        """call_soon_threadsafe: there is no other thread that sleeps."""

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """Work that takes virtual time returns a future in place of its result."""
        outcome: asyncio.Future[Any] = self.create_future()

        def work() -> None:
            if outcome.cancelled():
                return
            try:
                result = func(*args)
            except BaseException as error:
                outcome.set_exception(error)
                return
            if isinstance(result, asyncio.Future):
                result.add_done_callback(lambda done: _copy(done, outcome))
            else:
                outcome.set_result(result)

        self.call_later(self._rng.expovariate(1 / EXECUTOR_DELAY_S), work)
        return outcome

    async def bury(self) -> list[BaseException]:
        """The world is over: every task is cancelled, those of dead processes too, until all have ended; what they do
        now is seen by nobody. Returns what tasks had failed with that nobody had looked at."""
        unseen = [
            error
            for task in self.tasks
            if task.done() and task._log_traceback and not task.cancelled()  # type: ignore[attr-defined]
            if (error := task.exception()) is not None
        ]
        self._is_over = True
        self._ready.extend(self._never_run)  # type: ignore[attr-defined]
        me = asyncio.current_task()
        for _ in range(MOST_CANCELLATIONS):
            pending = [task for task in self.tasks if not task.done() and task is not me]
            if not pending:
                break
            for task in pending:
                task.cancel()
            await asyncio.sleep(0)
        for task in self.tasks:
            if task.done() and not task.cancelled():
                task.exception()
        return unseen


def _copy(done: asyncio.Future[Any], outcome: asyncio.Future[Any]) -> None:
    error = None if done.cancelled() else done.exception()  # looked at, whether or not somebody waits
    if outcome.cancelled():
        return
    if done.cancelled():
        outcome.cancel()
    elif error is not None:
        outcome.set_exception(error)
    else:
        outcome.set_result(done.result())


@contextlib.contextmanager
def as_the_only_clock(loop: SimulatedLoop, rng: random.Random) -> Iterator[None]:
    """While it lasts, `time` tells the loop's time, `secrets` and new generators draw from the seed, for everybody."""
    started_s = loop.now_s

    class Seeded(random.Random):
        def __init__(self, seed: Any = None) -> None:
            super().__init__(rng.getrandbits(64) if seed is None else seed)

    replaced: list[tuple[Any, str, Any]] = [
        (time, "monotonic", loop.time),
        (time, "monotonic_ns", lambda: int(loop.now_s * 1e9)),
        (time, "perf_counter", lambda: loop.now_s - started_s),
        (time, "time", lambda: loop.unix_ns() / 1e9),
        (time, "time_ns", loop.unix_ns),
        (random, "Random", Seeded),
        (secrets, "token_bytes", lambda size=32: rng.randbytes(size)),
        (secrets, "token_hex", lambda size=32: rng.randbytes(size).hex()),
        (secrets, "randbits", rng.getrandbits),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced]
    for module, name, value in replaced:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
