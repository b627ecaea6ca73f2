"""Something may have changed: wakes everyone who waits, and misses no change between a look and the wait after it."""

from __future__ import annotations

import asyncio
import contextlib


class Pulse:
    """`seen = pulse.version`, look around, `await pulse.beyond(seen)`: returns at once if it fired in between."""

    def __init__(self) -> None:
        self.version = 0
        self._fired: asyncio.Future[None] | None = None

    def fire(self) -> None:
        self.version += 1
        if self._fired is not None and not self._fired.done():
            self._fired.set_result(None)
        self._fired = None

    async def beyond(self, version: int, timeout_s: float) -> None:
        """Until `version` is past, or `timeout_s` seconds."""
        if self.version != version:
            return
        if self._fired is None:
            self._fired = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._fired)
