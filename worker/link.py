"""The link to one peer, as hand-overs to it share it; kvtransfer/link_queue.py decides. In the event loop alone."""

from __future__ import annotations

import asyncio
import concurrent.futures

from kvtransfer.link_queue import LinkQueue
from kvtransfer.transport import Peer

# Enough for what a link holds in a millisecond at 50 GB/s; one hand-over leaves half of it to others.
WINDOW_BYTES = 64 << 20
HANDOFF_BYTES = 32 << 20


class Link:
    def __init__(self, window_bytes: int = WINDOW_BYTES, handoff_bytes: int = HANDOFF_BYTES) -> None:
        self._queue = LinkQueue(window_bytes, handoff_bytes)
        self._asked: dict[str, asyncio.Future[None]] = {}
        self._releasing: dict[Peer, asyncio.Future[None]] = {}

    def ask(self, name: str, nbytes: int, slack_s: float) -> asyncio.Future[None]:
        """Done when hand-over `name` may write so many bytes, which landed() gives back; withdraw() before."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.ask(name, nbytes, slack_s)
        self._asked[name] = granted
        self._let()
        return granted

    def withdraw(self, name: str) -> None:
        """What it asked for and was not granted."""
        del self._asked[name]
        self._queue.withdraw(name)
        self._let()

    def landed(self, name: str, nbytes: int) -> None:
        self._queue.landed(name, nbytes)
        self._let()

    def leave(self, name: str) -> None:
        """The hand-over is over, and nothing of it is in flight."""
        self._queue.forget(name)

    async def release(self, peer: Peer) -> None:
        """Peer.release(), once for all hand-overs that wait for it. Raises as that does. In a thread of its own: it may
        wait long, and nothing else may wait behind it."""
        if peer not in self._releasing:
            thread = concurrent.futures.ThreadPoolExecutor(1, "release")
            released = asyncio.get_running_loop().run_in_executor(thread, peer.release)
            thread.shutdown(wait=False)
            self._releasing[peer] = released
            released.add_done_callback(lambda done: self._released(peer, done))
        await asyncio.shield(self._releasing[peer])

    def _released(self, peer: Peer, done: asyncio.Future[None]) -> None:
        del self._releasing[peer]
        if not done.cancelled():
            done.exception()  # whoever still waits is told

    def _let(self) -> None:
        while (name := self._queue.next()) is not None:
            self._asked.pop(name).set_result(None)
