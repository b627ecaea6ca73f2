"""All hand-overs to a worker. Memory of those whose stream broke goes into quarantine (worker/quarantine.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from worker.quarantine import Quarantine
from worker.receiver import Claims, Receiver, Reply, Request


class Handoffs:
    """All open streams."""

    def __init__(self, claims: Claims, quarantine: Quarantine) -> None:
        self.open_streams = 0
        self._claims = claims
        self._quarantine = quarantine

    async def stream(self, requests: AsyncIterator[Request]) -> AsyncIterator[Reply]:
        receiver = Receiver(self._claims)
        reading = asyncio.create_task(receiver.receive(requests))
        self.open_streams += 1
        try:
            while (reply := await receiver.replies.get()) is not None:
                yield reply
            if not receiver.out_of_patience:
                await reading
        finally:
            self.open_streams -= 1
            reading.cancel()
            await asyncio.wait([reading])
            if receiver.unproven:
                self._quarantine.take(receiver)
