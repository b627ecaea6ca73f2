"""One side of bench.peers as its driver sees it: a process that computes when asked, and whose CPU time is watched."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = Path(__file__).parent / "sides"
_SETTLE_S = 5.0


class SideFailed(Exception):
    """A side ended, or said that it cannot do what was asked."""


@dataclasses.dataclass(frozen=True, slots=True)
class Generated:
    token_ids: list[list[int]]  # of each prompt
    times_s: list[float]  # when token i of every prompt was there


class Side:
    """What it writes to stderr, and its libraries to stdout, is in `log`."""

    def __init__(
        self, name: str, python: Path, program: str, environment: dict[str, str], log: Path, load: dict[str, Any]
    ) -> None:
        """`python`, `log`: absolute. Raises SideFailed when it does not load, OSError when `python` cannot be run."""
        self.name, self._log = name, log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [python, PROGRAMS / program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                cwd=log.parent,
                text=True,
            )
        try:
            self.version: str = self._ask(verb="load", **load)["version"]
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: list[list[int]], num_tokens: int) -> Generated:
        """Raises SideFailed, also when tokens did not come for all prompts at once."""
        answer = self._ask(verb="generate", prompts=prompts, num_tokens=num_tokens)
        found = Generated(answer["token_ids"], answer["times_s"])
        lengths = {len(found.times_s), *map(len, found.token_ids)}
        if len(found.token_ids) != len(prompts) or lengths != {num_tokens}:
            raise SideFailed(
                f"{self.name} gave answers of {sorted(lengths)} tokens and times, {num_tokens} were asked for"
            )
        return found

    def cpu_s(self) -> float:
        """CPU seconds of its process, and of those that it started, so far; in steps of 10 ms."""
        first = psutil.Process(self._process.pid)
        used_s = 0.0
        for process in (first, *first.children(recursive=True)):
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used_s += times.user + times.system
        return used_s

    def settle(self) -> None:
        """Waits until it uses no CPU time: threads of OpenMP poll for a while after their last work."""
        deadline_s, last_s = time.monotonic() + _SETTLE_S, -1.0
        while (now_s := self.cpu_s()) != last_s and time.monotonic() < deadline_s:
            last_s = now_s
            time.sleep(0.1)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = self._log.read_text(errors="replace").strip().splitlines()[-5:]
            raise SideFailed(f"{self.name} ended; its last words:\n" + "\n".join(last))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SideFailed(f"{self.name}: {answer['error']}")
        return answer
