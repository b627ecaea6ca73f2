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
import collections
import contextlib
import contextvars
import heapq
import random
import secrets
import sys
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
        self.waiting: list[Handle] = []  # what came due while it was stopped

    @staticmethod
    def current() -> Process:
        return _process.get()


class Handle:
    """As asyncio's: what is to be called, unless it is cancelled before."""

    __slots__ = ("args", "callback", "context", "when_s")

    def __init__(
        self, callback: Callable[..., object], args: tuple[Any, ...], context: contextvars.Context, when_s: float
    ) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args
        self.context = context
        self.when_s = when_s

    def cancel(self) -> None:
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self.when_s


class SimulatedLoop(asyncio.AbstractEventLoop):
    """Of asyncio's loop all that the product uses, and no more, so that a callback costs little beyond what it does."""

    get_debug = False.__bool__  # asked at every task and future; a method in Python would cost more than they do
    is_closed = False.__bool__

    def __init__(self, rng: random.Random) -> None:
        self.now_s = MONOTONIC_AT_START_S
        self.callbacks = 0
        self.tasks: list[asyncio.Task[Any]] = []  # held, so that those of dead processes are not collected and run on
        self.failed: Callable[[str, BaseException | None], None] = lambda message, error: None  # nobody waits for it
        self._rng = rng
        self._ready: collections.deque[Handle] = collections.deque()
        self._timers: list[tuple[float, int, Handle]] = []  # a heap
        self._timers_set = 0
        self._never_run: list[Handle] = []  # of dead processes, held likewise
        self._is_over = False

    def time(self) -> float:
        return self.now_s

    def unix_ns(self) -> int:
        return int((UNIX_AT_START_S + self.now_s - MONOTONIC_AT_START_S) * 1e9)

    # ---- what asyncio asks for -------------------------------------------------------------------------------------

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, work: Any, *, name: str | None = None, context: Any = None) -> asyncio.Task[Any]:  # type: ignore[override]
        task = asyncio.Task(work, loop=self, name=name, context=context)
        self.tasks.append(task)
        return task

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        if context is None:
            context = contextvars.copy_context()
        handle = Handle(callback, args, context, self.now_s)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # there is no other thread

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object], *args: Any, context: Any = None) -> Handle:  # type: ignore[override]
        if context is None:
            context = contextvars.copy_context()
        handle = Handle(callback, args, context, when)
        if when <= self.now_s:
            self._ready.append(handle)
        else:
            self._timers_set += 1
            heapq.heappush(self._timers, (when, self._timers_set, handle))
        return handle

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.failed(context["message"], context.get("exception"))

    # ---- the course of time ----------------------------------------------------------------------------------------

    def run_until_complete(self, future: Any) -> Any:
        """As asyncio's. `future` is a coroutine, and no process's."""
        task = self.create_task(future)
        hooks = sys.get_asyncgen_hooks()
        sys.set_asyncgen_hooks(finalizer=lambda generator: self.call_soon(self.create_task, generator.aclose()))
        asyncio._set_running_loop(self)
        try:
            while not task.done():
                if not self._ready:
                    self._jump()
                self._run(self._ready.popleft())
        finally:
            asyncio._set_running_loop(None)
            sys.set_asyncgen_hooks(*hooks)
        return task.result()

    def _jump(self) -> None:
        """To the next timer that is still wanted, and all others of its moment."""
        timers = self._timers
        while timers and timers[0][2].callback is None:
            heapq.heappop(timers)
        assert timers, "nothing is ready and no timer is set: whoever waits now waits for ever"
        self.now_s = timers[0][0]
        while timers and timers[0][0] == self.now_s:
            self._ready.append(heapq.heappop(timers)[2])

    def _run(self, handle: Handle) -> None:
        callback = handle.callback
        if callback is None:
            return
        process = handle.context.get(_process)
        if process is None or self._is_over or (process.is_alive and not process.is_stopped):
            self.callbacks += 1
            try:
                handle.context.run(callback, *handle.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:
                self.failed(f"in {callback}", error)
        elif process.is_alive:
            process.waiting.append(handle)
        else:
            self._never_run.append(handle)

    # ---- processes and threads -------------------------------------------------------------------------------------

    def spawn(self, process: Process, work: Coroutine[Any, Any, Any], name: str = "") -> asyncio.Task[Any]:
        return self.create_task(work, name=name or None, context=process.context.copy())

    def go_on(self, process: Process) -> None:
        """A stopped process runs again: first all that came due meanwhile, in order."""
        process.is_stopped = False
        self._ready.extend(process.waiting)
        process.waiting.clear()

    def run_in(self, process: Process, callback: Callable[..., object], *args: Any) -> None:
        """Now, if it runs; else when it goes on, or never. For who runs in no process."""
        self._run(Handle(callback, args, process.context, self.now_s))

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
        self._ready.extend(self._never_run)
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
