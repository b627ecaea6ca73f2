"""A hand-over that breaks on its way, once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from spec.errors import TransferFailed
from worker.departures import Departures
from worker.receiver import Receiver


def break_once(monkeypatch: pytest.MonkeyPatch, chunks: int) -> list[int]:
    """The first hand-over from now on breaks behind so many chunks, once the receiver has checked them. Returns where
    the chunks that are sent end, as they are; -1 where it broke."""
    send, sent = Departures._send, []
    landed, checked = Receiver._landed, asyncio.Semaphore(0)

    async def sends(departures: Departures, chunk: Any) -> None:
        if len(sent) == chunks:
            for _ in range(chunks):
                await checked.acquire()
            sent.append(-1)
            raise TransferFailed("planted")
        await send(departures, chunk)
        sent.append(chunk.end)

    async def lands(receiver: Receiver, chunk: Any) -> None:
        await landed(receiver, chunk)
        checked.release()

    monkeypatch.setattr(Departures, "_send", sends)
    monkeypatch.setattr(Receiver, "_landed", lands)
    return sent
