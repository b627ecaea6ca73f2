"""What a sender makes of a decode worker that does not take its hand-over: it is never the sender that is lost."""

from __future__ import annotations

import concurrent.futures
import threading
import types
import typing
from collections.abc import AsyncIterator
from typing import Any

import pytest

from kvtransfer.digest import DigestPolicy
from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory
from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.host import Host
from service.ports import free_port
from spec.dtype import Dtype
from spec.errors import LegatoError, TicketRefused, TransferFailed, WorkerLost
from spec.layout import KVLayout
from worker.departures import Target, Way
from worker.sender import Sender

KEY = "a key for tests"
LAYOUT = KVLayout(1, 1, 2, 4, Dtype.FLOAT32)
# By which nothing is written.
WAYS = (Way(0, typing.cast("Any", types.SimpleNamespace(link_id=1)), typing.cast("Any", None)),)


class Unwilling(worker_pb2_grpc.WorkerServicer):
    def __init__(self, error: LegatoError) -> None:
        self.error = error

    async def Handoff(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.HandoffReply]:
        await anext(request_iterator)
        raise self.error
        yield


async def opened(address: str) -> None:
    ranks = (RankMemory(RankKV.whole(LAYOUT)),)
    ticket, nobody = worker_pb2.Ticket(consumer_id="decode-0"), typing.cast("Any", None)
    target = Target(ticket, worker_pb2.SignedTicket(), ranks, WAYS, "sockets", 5.0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        async with channel(address, KEY) as link:
            stub = worker_pb2_grpc.WorkerStub(link)
            await Sender(stub, nobody, target, "127.0.0.1:1", pool, DigestPolicy(0.0)).open(timeout_s=10.0)


class Willing(worker_pb2_grpc.WorkerServicer):
    async def Handoff(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.HandoffReply]:
        yield worker_pb2.HandoffReply(accepted=worker_pb2.HandoffReply.Accepted())
        async for _ in request_iterator:
            pass


async def test_scratch_memory_is_given_back_beside_the_event_loop() -> None:
    """A transport may have to wait before it lets go of memory."""
    ticket, nobody, threads = worker_pb2.Ticket(consumer_id="decode-0"), typing.cast("Any", None), list[int]()
    target = Target(ticket, worker_pb2.SignedTicket(), (RankMemory(RankKV.whole(LAYOUT)),), WAYS, "sockets", 5.0)
    async with Host("127.0.0.1", 0, internal_key=KEY) as host:
        host.add(worker_pb2_grpc.add_WorkerServicer_to_server, Willing(), "legato.v1.Worker", internal=True)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            async with channel(host.address, KEY) as link:
                stub = worker_pb2_grpc.WorkerStub(link)
                sender = Sender(stub, nobody, target, "127.0.0.1:1", pool, DigestPolicy(0.0))
                await sender.open(timeout_s=10.0)
                scratch = types.SimpleNamespace(release=lambda: threads.append(threading.get_ident()))
                sender._staging._scratch = typing.cast("Any", scratch)
                await sender.close()
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_nobody_is_there() -> None:
    with pytest.raises(TransferFailed, match="decode-0"):
        await opened(f"127.0.0.1:{free_port('127.0.0.1', 0)}")


async def test_who_is_there_still_loads() -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host:
        with pytest.raises(TransferFailed, match="decode-0"):
            await opened(host.address)


@pytest.mark.parametrize(
    ("says", "becomes"),
    [(TicketRefused("forged"), TicketRefused), (WorkerLost("rank 3 of decode-0 is gone"), TransferFailed)],
)
async def test_who_is_there_refuses(says: LegatoError, becomes: type[LegatoError]) -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host:
        host.add(worker_pb2_grpc.add_WorkerServicer_to_server, Unwilling(says), "legato.v1.Worker", internal=True)
        with pytest.raises(becomes, match=says.message):
            await opened(host.address)
