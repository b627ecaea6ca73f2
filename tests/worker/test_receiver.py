"""The receiving end of one hand-over, step by step."""

from __future__ import annotations

import asyncio
import threading
import types
import typing
from collections.abc import AsyncIterator
from typing import Any

from legato.v1 import worker_pb2
from worker.receiver import Receiver

Request = worker_pb2.HandoffRequest
TICKET = worker_pb2.Ticket(reservation_id="r", sequence_id="s")


class SlowClaims:
    """Admission waits for `prepared`."""

    def __init__(self) -> None:
        self.prepared, self.admitting, self.renewed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._claim = types.SimpleNamespace(reservation=TICKET, cancel_writer=None)
        renew = types.SimpleNamespace(renew=lambda *_: self.renewed.set())
        loop = types.SimpleNamespace(lock=threading.Lock(), wake=lambda: None)
        self.core = typing.cast("Any", types.SimpleNamespace(reservations=renew, loop=loop))

    def claim(self, sequence_id: str) -> Any:
        return self._claim

    def give_up(self, sequence_id: str, reason: Exception) -> None:
        raise AssertionError(reason)

    async def admit(self, ticket: Any, final: Any, claimed: Any) -> None:
        self.admitting.set()
        await self.prepared.wait()


async def test_signs_of_life_are_heard_while_a_step_takes_long() -> None:
    claims = SlowClaims()
    receiver = Receiver(claims)
    receiver.ticket = TICKET

    async def requests() -> AsyncIterator[Request]:
        yield Request(final=Request.Final())
        await claims.admitting.wait()
        yield Request(alive=Request.Alive())

    receiving = asyncio.create_task(receiver.receive(requests()))
    async with asyncio.timeout(10):
        await claims.renewed.wait()
        assert not receiver.settled
        claims.prepared.set()
        await receiving
    assert receiver.settled
    said = [receiver.replies.get_nowait() for _ in range(receiver.replies.qsize())]
    assert [reply and reply.WhichOneof("event") for reply in said] == ["admitted", None]
