"""Newer workers meet this one: it passes over what it does not know, and refuses whom it cannot understand."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import time
import types
import typing
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster import KEY, cluster, links_to
from tiny_llama import SHAPES, make_llama

from kvtransfer.digest import DigestPolicy
from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory
from legato.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.status import error_from_rpc
from service.wire import NEWEST, OLDEST
from spec.dtype import Dtype
from spec.errors import WireMismatch
from spec.layout import KVLayout
from worker.departures import Target, Way
from worker.link import Link
from worker.sender import Sender

PROMPT = [random.Random(4).randrange(3, 400) for _ in range(40)]
UNKNOWN_EVENT = b"\x7a\x00"  # field 15, empty: of HandoffRequest and HandoffReply it is none
UNKNOWN_FIELD = b"\xf8\x07\x05"  # field 127, the number 5
Request = worker_pb2.HandoffRequest


def reserve_request(decode: worker_pb2.WorkerRecord, producer: worker_pb2.WorkerRecord) -> worker_pb2.ReserveRequest:
    sampling = common_pb2.SamplingParams(max_tokens=4, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=1)
    sequence = worker_pb2.SequenceState(
        sequence_id="wire.0.1",
        prompt_token_ids=PROMPT,
        sampling=sampling,
        deadline_unix_ns=time.time_ns() + 60_000_000_000,
    )
    made = worker_pb2.ReserveRequest(
        router_id="tester",
        sequence=sequence,
        identity=decode.identity,
        producer_id=producer.worker_id,
        producer_epoch=producer.epoch,
    )
    return worker_pb2.ReserveRequest.FromString(made.SerializeToString() + UNKNOWN_FIELD)


def begin(signed: worker_pb2.SignedTicket, address: str, oldest: int, newest: int, link_id: int = 0) -> Request:
    wire = worker_pb2.WireVersions(oldest=oldest, newest=newest)
    links = [Request.Link(link_id=link_id)]
    made = Request.Begin(ticket=signed, producer_address=address, wire=wire, transport="sockets", links=links)
    return Request(begin=Request.Begin.FromString(made.SerializeToString() + UNKNOWN_FIELD))


async def test_a_newer_writer_is_understood_as_far_as_it_goes_or_refused_by_its_versions(
    tmp_path: Path, redis_url: str
) -> None:
    async with cluster(make_llama(tmp_path / "model", SHAPES[0]), redis_url) as running:
        decode, prefill = (running.workers[name].core.record for name in ("decode-0", "prefill-0"))
        async with channel(decode.address, KEY) as link:
            stub = worker_pb2_grpc.DecodeStub(link)
            subscription = stub.Subscribe(worker_pb2.SubscribeRequest(router_id="tester"))
            await subscription.read()
            reserved = await stub.Reserve(reserve_request(decode, prefill))
            assert reserved.wire == decode.wire

            stranger = worker_pb2_grpc.WorkerStub(link).Handoff()
            await stranger.write(begin(reserved.ticket, prefill.address, 7, 9))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await anext(aiter(stranger))
            error = error_from_rpc(caught.value)
            assert isinstance(error, WireMismatch)
            assert "prefill-0 speaks versions 7 to 9" in error.message

            with links_to(reserved) as open_link:
                newer = worker_pb2_grpc.WorkerStub(link).Handoff()
                await newer.write(begin(reserved.ticket, prefill.address, NEWEST, 9, open_link()))
                assert (await newer.read()).HasField("accepted")
                await newer.write(Request.FromString(UNKNOWN_EVENT))
                await newer.write(Request(alive=Request.Alive()))
                await newer.write(Request(quiet=Request.Quiet()))
                assert "the writer stopped" in (await newer.read()).cancel.message, "Quiet was understood"
                assert await newer.read() is grpc.aio.EOF
            subscription.cancel()
        await running.assert_as_at_start()


class NewerWorker(worker_pb2_grpc.WorkerServicer):
    """Says what this version does not know, before its answer and after it."""

    def __init__(self, answer: worker_pb2.HandoffReply) -> None:
        self.answer = answer
        self.begun: list[worker_pb2.WireVersions] = []

    async def Handoff(
        self, request_iterator: AsyncIterator[Request], context: Any
    ) -> AsyncIterator[worker_pb2.HandoffReply]:
        self.begun.append((await anext(request_iterator)).begin.wire)
        yield worker_pb2.HandoffReply.FromString(UNKNOWN_EVENT)
        yield self.answer
        yield worker_pb2.HandoffReply.FromString(UNKNOWN_EVENT)
        async for message in request_iterator:
            if message.HasField("final"):
                yield worker_pb2.HandoffReply(admitted=worker_pb2.HandoffReply.Admitted())
                return


@contextlib.asynccontextmanager
async def writing_to(newer: NewerWorker) -> AsyncIterator[Sender]:
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(newer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ranks = (RankMemory(RankKV.whole(KVLayout(1, 1, 2, 4, Dtype.FLOAT32))),)
    ticket, nobody = worker_pb2.Ticket(consumer_id="decode-0"), typing.cast("Any", None)
    peer = typing.cast("Any", types.SimpleNamespace(link_id=1))
    target = Target(ticket, worker_pb2.SignedTicket(), ranks, (Way(0, peer, Link()),), "sockets", 5.0)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as link:
            stub = worker_pb2_grpc.WorkerStub(link)
            try:
                yield Sender(stub, nobody, target, "127.0.0.1:1", pool, DigestPolicy(0.0))
            finally:
                await server.stop(0)


async def test_a_writer_passes_over_what_a_newer_owner_says() -> None:
    newer = NewerWorker(worker_pb2.HandoffReply(accepted=worker_pb2.HandoffReply.Accepted()))
    async with writing_to(newer) as sender:
        await sender.open(timeout_s=10.0)
        await sender.finish(worker_pb2.SequenceState())
        await sender.close()
    assert newer.begun == [worker_pb2.WireVersions(oldest=OLDEST, newest=NEWEST)]


async def test_what_is_passed_over_is_no_leave_to_write() -> None:
    cancel = worker_pb2.HandoffReply.Cancel(reason=common_pb2.WIRE_MISMATCH, message="versions 2 to 3")
    async with writing_to(NewerWorker(worker_pb2.HandoffReply(cancel=cancel))) as sender:
        with pytest.raises(WireMismatch, match="versions 2 to 3"):
            await sender.open(timeout_s=10.0)
        await sender.close()
