"""`python -m service.sandbox_process`: tries constraints out, each in a fork of its own. For service/sandbox.py only.

Lines of JSON: first the vocabulary, then {"id", "kind", "texts"} each; what comes back is {"id", "refusal"} ("": it was
compiled). The vocabulary is read once, here, and a fork has it at no cost. A fork that computes, takes memory or nests
too much is ended by the kernel, and that is its answer. The process ends with its standard input.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import resource
import select
import signal
import sys
import threading
import time
from typing import Any

from service.grammar import Compiler, Vocabulary, probe
from spec.constraint import Constraint
from spec.errors import InvalidParameter, UnsupportedModel

CPU_S = 0.5
WALL_S = 4.0
MEMORY_BYTES = 1 << 30  # beside what the vocabulary takes
STACK_BYTES = 1 << 20  # an eighth of what a worker's thread has, so that a worker has room where a fork had
AT_ONCE = 4
TOO_LARGE = "cannot be compiled: it takes too much time or memory, or is nested too deep"


@dataclasses.dataclass(slots=True)
class Fork:
    request_id: int
    pid: int
    until_s: float


class Sandbox:
    """`unread`: of standard input, what came behind the vocabulary."""

    def __init__(self, compiler: Compiler, unread: bytes) -> None:
        self._compiler, self._unread = compiler, unread
        self._waiting: collections.deque[dict[str, Any]] = collections.deque()
        self._forks: dict[int, Fork] = {}  # by the pipe that its answer comes through

    def serve(self) -> None:
        """Until standard input ends."""
        self._take(b"")
        while True:
            while self._waiting and len(self._forks) < AT_ONCE:
                self._begin(self._waiting.popleft())
            until_s = min((fork.until_s for fork in self._forks.values()), default=None)
            timeout_s = None if until_s is None else max(0.0, until_s - time.monotonic())
            ready, _, _ = select.select([0, *self._forks], [], [], timeout_s)
            if 0 in ready:
                if not (read := os.read(0, 1 << 20)):
                    break
                self._take(read)
            for pipe in [pipe for pipe in ready if pipe]:
                self._ended(pipe)
            for fork in self._forks.values():
                if fork.until_s <= time.monotonic():
                    os.kill(fork.pid, signal.SIGKILL)
        for fork in self._forks.values():
            os.kill(fork.pid, signal.SIGKILL)

    def _take(self, read: bytes) -> None:
        *lines, self._unread = (self._unread + read).split(b"\n")
        self._waiting.extend(json.loads(line) for line in lines)

    def _begin(self, request: dict[str, Any]) -> None:
        pipe, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            _confine()
            constraint = Constraint(request["kind"], tuple(request["texts"]))
            trying = threading.Thread(target=_try, args=(self._compiler, constraint, write_end))
            trying.start()
            trying.join()
            os._exit(0)
        os.close(write_end)
        self._forks[pipe] = Fork(request["id"], pid, time.monotonic() + WALL_S)

    def _ended(self, pipe: int) -> None:
        """Its pipe is ready: with its whole answer, which is short, or with the end."""
        fork, said = self._forks.pop(pipe), os.read(pipe, 4096)
        os.close(pipe)
        os.waitpid(fork.pid, 0)
        answer = {"id": fork.request_id, "refusal": said[1:].decode() if said else TOO_LARGE}
        print(json.dumps(answer), flush=True)


def _confine() -> None:
    """Of a fork: what the kernel ends it for."""
    os.dup2(os.open(os.devnull, os.O_RDWR), 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/statm") as statm:  # of Linux alone
        limit = int(statm.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    threading.stack_size(STACK_BYTES)
    signal.setitimer(signal.ITIMER_PROF, CPU_S)


def _try(compiler: Compiler, constraint: Constraint, write_end: int) -> None:
    refusal = ""
    try:
        probe(compiler, constraint)
    except InvalidParameter as error:
        refusal = error.message.removeprefix(f"{constraint.kind} ")
    except MemoryError:
        refusal = TOO_LARGE
    os.write(write_end, b"." + refusal.encode()[:4000])


def main() -> int:
    parts: list[bytes] = []
    while not parts or b"\n" not in parts[-1]:
        parts.append(os.read(0, 1 << 20))
        if not parts[-1]:
            return 0
    vocabulary, _, unread = b"".join(parts).partition(b"\n")
    compiler = Compiler(lambda: Vocabulary(**json.loads(vocabulary)))
    with contextlib.suppress(UnsupportedModel):  # the answer to every constraint is then that
        compiler.prepare()
    Sandbox(compiler, unread).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
