"""The receiving end of one hand-over, step by step."""

from __future__ import annotations

import asyncio
import threading
import types
import typing
from collections.abc import AsyncIterator
from typing import Any

import pytest

import worker.receiver
from legato.v1 import worker_pb2
from spec.errors import TransferFailed
from worker.handoffs import Handoffs
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


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_writer_that_does_not_stop_is_waited_for_no_longer(
    monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    """Its stream stays open; where it says Quiet in time, nothing of it goes into quarantine."""
    claims, told = SlowClaims(), asyncio.Event()
    claims.core.reservations.quiet = lambda *_: None
    monkeypatch.setattr(claims, "give_up", lambda *_: None)
    monkeypatch.setattr(worker.receiver, "QUIET_TIMEOUT_S", 0.2 if hangs else 60.0)

    async def opened(receiver: Receiver, begin: Request.Begin) -> None:
        receiver.ticket, receiver.begin = TICKET, begin
        claims.claim("s").cancel_writer = receiver._cancel_writer

    monkeypatch.setattr(Receiver, "_open", opened)

    async def requests() -> AsyncIterator[Request]:
        yield Request(begin=Request.Begin())
        await (asyncio.Event() if hangs else told).wait()
        yield Request(quiet=Request.Quiet())

    taken: list[Receiver] = []
    handoffs = Handoffs(claims, typing.cast("Any", types.SimpleNamespace(take=taken.append)))
    said = []
    async with asyncio.timeout(10):
        async for reply in handoffs.stream(requests()):
            said.append(reply.WhichOneof("event"))
            if reply.HasField("accepted"):
                claims.claim("s").cancel_writer(TransferFailed("no sign of the writer"))
            else:
                told.set()
    assert said == ["accepted", "cancel"]
    assert [receiver.unproven for receiver in taken] == ([True] if hangs else [])
    assert handoffs.open_streams == 0
