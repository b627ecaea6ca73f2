"""Real grpc.aio servers on 127.0.0.1: all four kinds of handler, typed errors, authentication, bad bytes, stopping."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from legato.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from service.channel import Channel, channel
from service.host import Host
from service.status import abort, error_from_rpc
from spec import errors

KEY = "the cluster's key"
DECODE, INFERENCE, WORKER = "legato.v1.Decode", "legato.v1.Inference", "legato.v1.Worker"


class Decode(worker_pb2_grpc.DecodeServicer):
    """What a handler may do: answer, raise ours, raise anything, never end."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.started = asyncio.Event()

    async def Abort(self, request: worker_pb2.AbortRequest, context: Any) -> worker_pb2.AbortResponse:
        if request.sequence_id == "ours":
            raise errors.OutOfBlocks("none is free", free=0)
        if request.sequence_id == "defect":
            raise ZeroDivisionError("secret words")
        if request.sequence_id == "aborts":
            await abort(context, errors.Draining("leaving"))
        return worker_pb2.AbortResponse()

    async def Subscribe(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.StepOutput]:
        try:
            for steps in range(3):
                yield worker_pb2.StepOutput(load=worker_pb2.WorkerLoad(steps=steps))
            if request.router_id == "ours":
                raise errors.WorkerLost("the stream broke")
            if request.router_id == "defect":
                raise KeyError("oops")
            self.started.set()
            await asyncio.Event().wait()
        finally:
            self.closed.append(request.router_id)


class Worker(worker_pb2_grpc.WorkerServicer):
    async def Handoff(self, request_iterator: Any, context: Any) -> AsyncIterator[worker_pb2.HandoffReply]:
        async for request in request_iterator:
            if request.WhichOneof("event") == "quiet":
                raise errors.DigestMismatch("not these blocks")
            yield worker_pb2.HandoffReply(accepted=worker_pb2.HandoffReply.Accepted())


class Inference(inference_pb2_grpc.InferenceServicer):
    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(token_ids=[len(request.text)])

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse()


async def serve(host: Host) -> Decode:
    servicer = Decode()
    host.add(worker_pb2_grpc.add_DecodeServicer_to_server, servicer, DECODE, internal=True)
    host.add(worker_pb2_grpc.add_WorkerServicer_to_server, Worker(), WORKER, internal=True)
    host.add(inference_pb2_grpc.add_InferenceServicer_to_server, Inference(), INFERENCE)
    await host.set_serving(DECODE, True)
    await host.set_serving(WORKER, True)
    return servicer


async def failure(call: Any) -> errors.LegatoError:
    with pytest.raises(grpc.RpcError) as caught:
        await (all_of(call) if hasattr(call, "__aiter__") else call)
    return error_from_rpc(caught.value)


async def all_of(call: Any) -> list[Any]:
    return [message async for message in call]


async def test_typed_errors_of_every_kind_of_handler() -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host, channel(host.address, KEY) as peer:
        await serve(host)
        stub = worker_pb2_grpc.DecodeStub(peer)
        assert await stub.Abort(worker_pb2.AbortRequest(sequence_id="fine")) == worker_pb2.AbortResponse()

        error = await failure(stub.Abort(worker_pb2.AbortRequest(sequence_id="ours")))
        assert (type(error), error.message, error.details) == (errors.OutOfBlocks, "none is free", {"free": "0"})
        error = await failure(stub.Subscribe(worker_pb2.SubscribeRequest(router_id="ours")))
        assert type(error) is errors.WorkerLost
        error = await failure(stub.Abort(worker_pb2.AbortRequest(sequence_id="aborts")))
        assert type(error) is errors.Draining

        async def requests() -> AsyncIterator[worker_pb2.HandoffRequest]:
            yield worker_pb2.HandoffRequest(chunk=worker_pb2.HandoffRequest.Chunk(num_tokens=1))
            yield worker_pb2.HandoffRequest(quiet=worker_pb2.HandoffRequest.Quiet())

        call = worker_pb2_grpc.WorkerStub(peer).Handoff(requests())
        assert (await call.read()).WhichOneof("event") == "accepted"
        assert type(await failure(call.read())) is errors.DigestMismatch


async def test_a_defect_is_logged_under_an_id_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host, channel(host.address, KEY) as peer:
        await serve(host)
        stub = worker_pb2_grpc.DecodeStub(peer)
        with caplog.at_level(logging.ERROR, "legato"):
            for call in (
                stub.Abort(worker_pb2.AbortRequest(sequence_id="defect")),
                stub.Subscribe(worker_pb2.SubscribeRequest(router_id="defect")),
            ):
                error = await failure(call)
                assert type(error) is errors.InternalError
                assert error.details["error_id"] in caplog.text
                assert "secret words" not in error.message
        assert "ZeroDivisionError" in caplog.text
        assert "Traceback" in caplog.text
        assert await stub.Abort(worker_pb2.AbortRequest()) == worker_pb2.AbortResponse()


async def test_a_client_that_leaves_ends_its_handler() -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY, drain_s=60) as host, channel(host.address, KEY) as peer:
        servicer = await serve(host)
        call = worker_pb2_grpc.DecodeStub(peer).Subscribe(worker_pb2.SubscribeRequest(router_id="leaves"))
        await asyncio.wait_for(servicer.started.wait(), 10)
        call.cancel()
        await asyncio.wait_for(host.stop(), 10)  # a call that went on would hold it for a minute
        assert servicer.closed == ["leaves"]


@pytest.mark.parametrize("key", [None, "another cluster's"])
async def test_internal_services_want_the_clusters_token(key: str | None) -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host, channel(host.address, key) as peer:
        await serve(host)
        stub = worker_pb2_grpc.DecodeStub(peer)
        assert type(await failure(stub.Abort(worker_pb2.AbortRequest()))) is errors.Unauthenticated
        assert type(await failure(stub.Subscribe(worker_pb2.SubscribeRequest()))) is errors.Unauthenticated
        await inference_pb2_grpc.InferenceStub(peer).ListModels(
            inference_pb2.ListModelsRequest()
        )  # public, no keys set


async def test_a_host_without_a_key_serves_nothing_internal() -> None:
    async with Host("127.0.0.1", 0) as host, channel(host.address, "") as peer:
        await serve(host)
        error = await failure(worker_pb2_grpc.DecodeStub(peer).Abort(worker_pb2.AbortRequest()))
        assert type(error) is errors.Unauthenticated


@pytest.mark.parametrize(
    ("shown", "good"),
    [("Bearer second", True), ("bearer first", True), ("Bearer third", False), ("first", False), (None, False)],
)
async def test_api_keys(shown: str | None, good: bool) -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY, api_keys=["first", "second"]) as host:
        await serve(host)
        async with grpc.aio.insecure_channel(host.address) as peer:
            metadata = (("authorization", shown),) if shown is not None else ()
            call = inference_pb2_grpc.InferenceStub(peer).ListModels(
                inference_pb2.ListModelsRequest(), metadata=metadata
            )
            if good:
                await call
            else:
                assert type(await failure(call)) is errors.Unauthenticated


@pytest.mark.parametrize("data", [b"\x12\x02\xc3\x28", b"\xff\xff\xff"], ids=["broken UTF-8", "no protobuf"])
async def test_bytes_that_are_no_message_are_the_clients_fault(data: bytes) -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host, channel(host.address, KEY) as peer:
        await serve(host)
        unary = peer.unary_unary(f"/{INFERENCE}/Tokenize", request_serializer=None, response_deserializer=None)
        error = await failure(unary(data))
        assert type(error) is errors.InvalidParameter
        assert "TokenizeRequest" in error.message
        stream = peer.stream_stream(f"/{WORKER}/Handoff", request_serializer=None, response_deserializer=None)
        assert type(await failure(stream([data]))) is errors.InvalidParameter
        stub = inference_pb2_grpc.InferenceStub(peer)
        answer = await stub.Tokenize(inference_pb2.TokenizeRequest(text="abc"))
        assert answer.token_ids == [3]


async def test_a_message_that_is_too_large_is_the_clients_fault() -> None:
    host = Host("127.0.0.1", 0, internal_key=KEY, max_message_bytes=1000)
    async with host, channel(host.address, KEY) as peer:
        await serve(host)
        stub = inference_pb2_grpc.InferenceStub(peer)
        error = await failure(stub.Tokenize(inference_pb2.TokenizeRequest(text="x" * 2000)))
        assert type(error) is errors.InvalidParameter


async def test_an_unknown_method_and_an_unwritten_one() -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host, channel(host.address, KEY) as peer:
        await serve(host)
        with pytest.raises(grpc.RpcError) as caught:
            await peer.unary_unary("/legato.v1.Nothing/Here")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_a_taken_port_is_named(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(errors.InvalidConfiguration, match=rf"port {port} on {name} is taken"):
            async with Host(name, port):
                pass


async def test_two_hosts_never_share_a_port() -> None:
    async with Host("127.0.0.1", 0) as first:
        with pytest.raises(errors.InvalidConfiguration, match=str(first.port)):
            async with Host("127.0.0.1", first.port):
                pass


async def test_a_host_that_cannot_be_is_named() -> None:
    with pytest.raises(errors.InvalidConfiguration, match=r"no\.such\.host\.invalid"):
        async with Host("no.such.host.invalid", 0):
            pass


async def health(peer: Channel, service: str) -> str:
    answer = await health_pb2_grpc.HealthStub(peer).Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


async def test_health_is_per_service_and_as_a_whole() -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host, channel(host.address) as peer:
        assert await health(peer, "") == "NOT_SERVING"
        await serve(host)
        assert [await health(peer, name) for name in (DECODE, INFERENCE, "")] == [
            "SERVING",
            "NOT_SERVING",
            "NOT_SERVING",
        ]
        watch = health_pb2_grpc.HealthStub(peer).Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await host.set_serving(INFERENCE, True)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert await health(peer, "") == "SERVING"


async def test_reflection_lists_the_services_and_their_messages() -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY) as host, channel(host.address) as peer:
        await serve(host)
        stub = reflection_pb2_grpc.ServerReflectionStub(peer)
        requests: Iterable[Any] = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=DECODE),
        ]
        answers = [answer async for answer in stub.ServerReflectionInfo(requests)]
        names = {service.name for service in answers[0].list_services_response.service}
        assert {DECODE, INFERENCE, WORKER, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} == names
        assert answers[1].file_descriptor_response.file_descriptor_proto


class Slow(inference_pb2_grpc.InferenceServicer):
    def __init__(self) -> None:
        self.begun, self.end = asyncio.Event(), asyncio.Event()

    async def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        self.begun.set()
        await self.end.wait()
        return inference_pb2.ListModelsResponse()


async def test_stopping_lets_calls_end_and_says_so() -> None:
    slow = Slow()
    host = Host("127.0.0.1", 0, drain_s=30)
    async with channel("127.0.0.1:1"), host:
        host.add(inference_pb2_grpc.add_InferenceServicer_to_server, slow, INFERENCE)
        async with channel(host.address) as peer:
            await host.set_serving(INFERENCE, True)
            watch = health_pb2_grpc.HealthStub(peer).Watch(health_pb2.HealthCheckRequest(service=INFERENCE))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            call = inference_pb2_grpc.InferenceStub(peer).ListModels(inference_pb2.ListModelsRequest())
            await asyncio.wait_for(slow.begun.wait(), 10)
            stopping = asyncio.create_task(host.stop())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not stopping.done()
            slow.end.set()
            assert await call == inference_pb2.ListModelsResponse()
            await asyncio.wait_for(stopping, 10)  # the health watch does not hold it


async def test_stopping_ends_what_does_not_end() -> None:
    async with Host("127.0.0.1", 0, internal_key=KEY, drain_s=0.1) as host, channel(host.address, KEY) as peer:
        servicer = await serve(host)
        call = worker_pb2_grpc.DecodeStub(peer).Subscribe(worker_pb2.SubscribeRequest(router_id="stays"))
        await asyncio.wait_for(servicer.started.wait(), 10)
        await asyncio.wait_for(host.stop(), 10)
        assert type(await failure(call)) in (errors.RequestCancelled, errors.WorkerLost)
        assert servicer.closed == ["stays"]
