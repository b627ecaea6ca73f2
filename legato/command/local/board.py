"""Shows the processes of a cluster on standard error: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from legato.command import terminal
from legato.command.local.child import Child

REFRESH_S = 0.25
COLOURS = {"starting": "yellow", "ready": "green", "restarting": "magenta", "stopping": "yellow", "ended": "red"}


class Board:
    """`changed` is told of every change of a state, `say` of what no state shows; `live()` draws while its block
    runs; or `is_quiet`. A terminal that was closed stops nobody."""

    def __init__(self) -> None:
        self._children: list[Child] = []
        self.is_quiet = False
        self._is_live = False
        self._since_s = time.monotonic()

    def changed(self, child: Child) -> None:
        if child not in self._children:
            self._children.append(child)
            if len(self._children) == 1 and not self._is_live:
                self.say(f"logs are in {child.log_path.parent}")
        if self._is_live or self.is_quiet:
            return
        words = [f"{time.monotonic() - self._since_s:6.1f} s ", f"{child.name:<10}", child.state]
        words += [f"pid {child.pid}"] if child.state in ("starting", "ready") else []
        words += [child.address] if child.state == "ready" and child.address else []
        if child.state == "restarting":
            words.append(f"(for the {_nth(child.restarts)} time; log: {child.log_path})")
        self.say(" ".join(words))

    def say(self, words: str) -> None:
        with contextlib.suppress(OSError):
            terminal.err.print(words, markup=False)

    @contextlib.asynccontextmanager
    async def live(self, folder: Path) -> AsyncIterator[None]:
        if not terminal.err.is_terminal:
            yield
            return
        self._is_live = True
        # What is printed goes above the table where standard output is this terminal too, else where it is sent.
        live = Live(
            self._draw(folder),
            console=terminal.err,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
        )
        live.start()
        task = asyncio.create_task(self._refresh(live, folder))
        try:
            yield
        finally:
            self._is_live = False
            task.cancel()
            with contextlib.suppress(OSError):
                live.stop()
                if self._children:
                    terminal.err.print(self._draw(folder))

    async def _refresh(self, live: Live, folder: Path) -> None:
        with contextlib.suppress(OSError):
            while True:
                live.update(self._draw(folder), refresh=True)
                await asyncio.sleep(REFRESH_S)

    def _draw(self, folder: Path) -> Table:
        caption = f"logs are in {folder}" if self._children else None
        table = Table(box=None, padding=(0, 2, 0, 0), caption=caption, caption_justify="left")
        for name in ("process", "state", "pid", "address", "restarts", ""):
            table.add_column(name)
        for child in self._children:
            state = Text(child.state, style=COLOURS[child.state])
            restarts = str(child.restarts) if child.restarts else ""
            table.add_row(child.name, state, str(child.pid or ""), child.address, restarts, _detail(child))
        return table


def _detail(child: Child) -> RenderableType:
    if child.state != "starting":
        return ""
    told = child.progress()
    if told is None:
        return f"{time.monotonic() - child.started_s:.0f} s"
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(ProgressBar(total=100, completed=told[1], width=20), told[0])
    return grid


def _nth(count: int) -> str:
    return {1: "1st", 2: "2nd", 3: "3rd"}.get(count, f"{count}th")
