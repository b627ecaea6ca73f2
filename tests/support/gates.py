"""Where a process is made to wait, so that a fault hits the phase that a test names and no other.

    test                                       process (tests/support/nursery.py says where the gates are)
    gates.hold("prefill-0", "post", after=1)   passes once, and waits at the second time
    await gates.held(["prefill-0"], "post")
    ... fault ...
    gates.open_all()                           goes on

A gate is a file; it holds how often it may be passed and a word that tells one hold from the next. What is injected is
a file too: gates.inject("prefill-0", "flip") has the next transfer of that worker go wrong so.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

LOOK_S = 0.005
HELD_TIMEOUT_S = 20.0


class Gates:
    """The test's side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def hold(self, name: str, point: str, after: int = 0) -> None:
        gate = self.folder / f"{name}.{point}"
        (self.folder / f"{name}.{point}.held").unlink(missing_ok=True)
        written = gate.with_suffix(".new")
        written.write_text(f"{after} {secrets.token_hex(4)}")
        written.rename(gate)

    def open(self, point: str) -> None:
        """Whoever is held there goes on."""
        for gate in self.folder.glob(f"*.{point}*"):
            gate.unlink(missing_ok=True)

    def inject(self, name: str, kind: str) -> None:
        (self.folder / f"{name}.inject.{kind}").touch()

    async def held(self, names: Iterable[str], point: str) -> list[str]:
        """Those of `names` that wait there, as soon as one does."""
        deadline_s = time.monotonic() + HELD_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if found := [name for name in names if (self.folder / f"{name}.{point}.held").exists()]:
                return found
            await asyncio.sleep(LOOK_S)
        raise AssertionError(f"nobody came to the gate {point}")

    def open_all(self) -> None:
        for gate in self.folder.iterdir():
            gate.unlink(missing_ok=True)


def injected(folder: Path, name: str) -> str:
    """The kind, once; "" where there is none. For the process's side."""
    for file in folder.glob(f"{name}.inject.*"):
        with contextlib.suppress(FileNotFoundError):  # another thread was faster
            file.unlink()
            return file.suffix[1:]
    return ""


class Gate:
    """The process's side: one point in it. Any thread may wait here."""

    def __init__(self, folder: Path, name: str, point: str) -> None:
        self._file = folder / f"{name}.{point}"
        self._held = folder / f"{name}.{point}.held"
        self._word = ""
        self._left = 0

    def _read(self) -> tuple[int, str]:
        try:
            after, word = self._file.read_text().split()
        except FileNotFoundError:
            return 0, ""
        return int(after), word

    def _is_shut(self) -> bool:
        after, word = self._read()
        if word != self._word:
            self._word, self._left = word, after
        if self._left:
            self._left -= 1
            return False
        if word:
            self._held.touch()
        return bool(word)

    def _opens(self) -> bool:
        return self._read()[1] != self._word

    def wait(self) -> None:
        if self._is_shut():
            while not self._opens():
                time.sleep(LOOK_S)

    async def wait_in_event_loop(self) -> None:
        if self._is_shut():
            while not self._opens():
                await asyncio.sleep(LOOK_S)
