"""One trace over the borders of processes: W3C context through our channels and servers, spans at a real receiver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from legato.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from service import tracing
from service.channel import Channel, channel
from service.host import Host
from spec import errors
from telemetry import names
from telemetry.setup import Telemetry, setup

KEY = "the cluster's key"
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = ("traceparent", f"00-{TRACE}-{SPAN}-01")


class Worker(worker_pb2_grpc.DecodeServicer):
    def __init__(self, telemetry: Telemetry) -> None:
        self.spans = tracing.Spans(telemetry)
        self.seen: list[str] = []

    async def Subscribe(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.StepOutput]:
        self.seen.append(f"{trace.get_current_span().get_span_context().trace_id:032x}")
        with self.spans.span(names.SPAN_DECODE, {names.WORKER_ID: "decode-0"}):
            self.spans.record(names.SPAN_DECODE_QUEUE, 1_000, 2_000)
            self.spans.record(names.SPAN_DECODE_FIRST_STEP, 0, 2_000)  # a stage that was not passed
            yield worker_pb2.StepOutput()
            if request.router_id == "fails":
                raise errors.OutOfBlocks("none")


class Router(inference_pb2_grpc.InferenceServicer):
    def __init__(self, telemetry: Telemetry, worker: Channel) -> None:
        self.spans = tracing.Spans(telemetry)
        self.stub = worker_pb2_grpc.DecodeStub(worker)

    async def Tokenize(self, request: Any, context: Any) -> inference_pb2.TokenizeResponse:
        with self.spans.span(names.SPAN_REQUEST, {names.REQUEST_ID: "r-1"}):
            try:
                async for _ in self.stub.Subscribe(worker_pb2.SubscribeRequest(router_id=request.text)):
                    pass
            except grpc.RpcError:
                return inference_pb2.TokenizeResponse()
        return inference_pb2.TokenizeResponse()


async def ask(telemetry: Telemetry, text: str, *metadata: tuple[str, str]) -> Worker:
    worker = Worker(telemetry)
    async with Host("127.0.0.1", 0, internal_key=KEY) as inner, channel(inner.address, KEY) as peer:
        inner.add(worker_pb2_grpc.add_DecodeServicer_to_server, worker, "legato.v1.Decode", internal=True)
        async with Host("127.0.0.1", 0) as outer, grpc.aio.insecure_channel(outer.address) as client:
            router = Router(telemetry, peer)
            outer.add(inference_pb2_grpc.add_InferenceServicer_to_server, router, "legato.v1.Inference")
            stub = inference_pb2_grpc.InferenceStub(client)
            await stub.Tokenize(inference_pb2.TokenizeRequest(text=text), metadata=metadata)
    return worker


async def test_one_trace_over_client_router_and_worker(otlp_receiver: Any) -> None:
    telemetry = setup("legato-test", otlp_receiver.endpoint)
    await ask(telemetry, "fails", TRACEPARENT)
    telemetry.close()
    spans = {item["name"]: item for item in otlp_receiver.arrived() if item["kind"] == "span"}
    assert set(spans) == {names.SPAN_REQUEST, names.SPAN_DECODE, names.SPAN_DECODE_QUEUE}
    assert {span["trace"] for span in spans.values()} == {TRACE}
    request, decode, queue = (spans[name] for name in (names.SPAN_REQUEST, names.SPAN_DECODE, names.SPAN_DECODE_QUEUE))
    assert request["parent"] == SPAN
    assert decode["parent"] == request["span"]
    assert queue["parent"] == decode["span"]
    assert (queue["start"], queue["end"]) == (1_000, 2_000)
    assert request["attributes"][names.REQUEST_ID] == "r-1"
    assert decode["attributes"][names.ERROR_REASON] == "OUT_OF_BLOCKS"


async def test_a_router_without_telemetry_still_passes_the_context_on() -> None:
    worker = await ask(setup("legato-test"), "works", TRACEPARENT)
    assert worker.seen == [TRACE]


@pytest.mark.parametrize("header", ["", "00-xyz", f"00-{'0' * 32}-{SPAN}-01"])
async def test_a_broken_context_is_none(header: str) -> None:
    worker = await ask(setup("legato-test"), "works", ("traceparent", header))
    assert worker.seen == ["0" * 32]


def test_inject_and_extract_agree_with_the_librarys_propagator() -> None:
    context = tracing.extract([("x", "y"), TRACEPARENT, ("tracestate", "a=b")])
    assert context is not None
    with trace.use_span(trace.get_current_span(context)):
        injected = dict(tracing.inject())
    theirs: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(theirs, context)
    assert injected == theirs
    assert injected["traceparent"] == TRACEPARENT[1]
    assert tracing.inject() == []
    assert tracing.extract([]) is None


def test_a_span_is_declared_before_it_is_opened() -> None:
    spans = tracing.Spans(setup("legato-test"))
    with pytest.raises(AssertionError, match=r"names\.py"), spans.span("legato.undeclared"):
        pass
