"""One process of a local cluster: started with a log file and a pipe, in a process group of its own.

Ctrl-C reaches only who started it (the group), and it ends when that one does (the pipe).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TAIL_BYTES = 8192
_WARNING = re.compile(r"\S+Z (?:warning|error|critical) +(.*)")  # of a log line of service/logs.py
_PROGRESS = re.compile(r"state=loading step='([^']*)' percent=(\d+)")


class Child:
    """`state` is starting, ready, restarting, stopping or ended; who supervises it moves it on."""

    def __init__(self, name: str, command: Sequence[str], log_path: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self.log_path = log_path
        self.state = "starting"
        self.address = ""
        self.restarts = 0
        self.started_s = 0.0
        self.was_ready = False  # ever
        self.ready = asyncio.Event()  # now
        self._command = list(command)
        self._environment = dict(environment)
        self._process: asyncio.subprocess.Process | None = None
        self._end: asyncio.Task[int] | None = None

    @property
    def pid(self) -> int:
        return self._process.pid if self._process is not None else 0

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """A new process; appends to the log."""
        self.started_s = time.monotonic()
        self.ready.clear()
        self.state = "starting"
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._environment,
                process_group=0,
            )
        self._end = asyncio.create_task(_end_of(self._process))

    async def wait(self) -> int:
        """The exit code; negative: the signal that ended it. Nothing of its group runs any more then."""
        assert self._end is not None, "start() comes first"
        return await asyncio.shield(self._end)

    def mark_ready(self, address: str = "") -> None:
        self.state, self.was_ready = "ready", True
        self.address = address or self.address
        self.ready.set()

    def ask_to_stop(self) -> None:
        if self.is_running:
            assert self._process is not None
            self.state = "stopping"
            self._process.terminate()

    def kill(self) -> None:
        """The whole group: a compiler that it runs, too."""
        if self.is_running:
            _kill_group(self.pid)

    def last_lines(self, count: int = 1) -> list[str]:
        """Of its log, as it stands now."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
                lines = log.read().decode("utf-8", "replace").splitlines()
        except OSError:
            return []
        return [line for line in lines if line.strip()][-count:]

    def last_warning(self) -> str | None:
        """Of its log; without the time."""
        for line in reversed(self.last_lines(TAIL_BYTES)):
            told = _WARNING.fullmatch(line)
            if told:
                return told[1]
        return None

    def progress(self) -> tuple[str, int] | None:
        """(step, percent) of the loading that it last told of."""
        for line in reversed(self.last_lines(5)):
            told = _PROGRESS.search(line)
            if told:
                return told[1], int(told[2])
        return None


async def _end_of(process: asyncio.subprocess.Process) -> int:
    """What it leaves behind (the server of a killed tether) would hold its port. Its group's number is free for others
    once the group is empty, so this is done once, as soon as the leader has ended."""
    code = await process.wait()
    _kill_group(process.pid)
    return code


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
