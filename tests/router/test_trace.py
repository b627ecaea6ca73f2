"""The router's part of a request's trace: two spans, and the parent of what workers record (telemetry/names.py)."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import grpc
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from legato.v1 import common_pb2, inference_pb2
from service.tokenizer import Tokenizer
from spec.errors import WorkerLost
from telemetry import names
from telemetry.setup import setup
from tests.router.test_moves import drain
from tests.router.toy_cluster import ToyDecode, ToyPrefill, ToyRouter


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def traced(tokenizer: Tokenizer, exporter: InMemorySpanExporter) -> AsyncIterator[ToyRouter]:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry = dataclasses.replace(setup("traced"), tracer=provider.get_tracer("traced"), enabled=True)
    async with ToyRouter(tokenizer, telemetry=telemetry) as router:
        yield router


async def ask(router: ToyRouter, n: int = 1, timeout_s: float = 20, max_tokens: int = 8) -> None:
    sampling = common_pb2.SamplingParams(max_tokens=max_tokens, seed=3, ignore_eos=True)
    options = inference_pb2.AnswerOptions(sampling=sampling, n=n)
    asked = inference_pb2.GenerateRequest(text="hello", options=options)
    async for _ in router.stub.Generate(asked, timeout=timeout_s):
        pass
    await router.at_rest()


def request_and_routes(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, list[ReadableSpan]]:
    """One request, its routes below it and within its time, and nothing else."""
    spans = exporter.get_finished_spans()
    (request,) = [span for span in spans if span.name == names.SPAN_REQUEST]
    routes = [span for span in spans if span.name == names.SPAN_ROUTE]
    assert len(spans) == 1 + len(routes), "a worker records its own spans: a second recorder would double them"
    for route in routes:
        assert route.parent.span_id == request.context.span_id
        assert route.context.trace_id == request.context.trace_id
        assert request.start_time <= route.start_time <= route.end_time <= request.end_time
    return request, routes


async def test_workers_are_called_under_the_request(traced: ToyRouter, exporter: InMemorySpanExporter) -> None:
    prefill, decode = ToyPrefill("p0"), ToyDecode("d0")
    await traced.join(prefill, decode)
    await ask(traced)
    request, routes = request_and_routes(exporter)
    assert [route.start_time for route in routes] == [request.start_time], "tokenising is part of the route"
    called = prefill.called_under + decode.called_under
    assert [method for method, _ in called] == ["Prefill", "Reserve"]
    assert [(span.trace_id, span.span_id) for _, span in called] == [
        (request.context.trace_id, request.context.span_id)
    ] * 2


async def test_a_decode_worker_that_prefills_is_called_under_the_request(
    traced: ToyRouter, exporter: InMemorySpanExporter
) -> None:
    decode = ToyDecode("d0")
    await traced.join(decode)
    await ask(traced)
    request, _ = request_and_routes(exporter)
    assert [(method, span.span_id) for method, span in decode.called_under] == [("Admit", request.context.span_id)]


async def test_every_attempt_and_every_choice_is_a_route(traced: ToyRouter, exporter: InMemorySpanExporter) -> None:
    prefills = ToyPrefill("p0"), ToyPrefill("p1")
    prefills[0].faults.error_before_first_once = WorkerLost("planted")
    await traced.join(*prefills, ToyDecode("d0"))
    await ask(traced, n=2)
    request, routes = request_and_routes(exporter)
    assert sorted(route.attributes[names.ATTEMPT] for route in routes) == [1, 1, 2]
    assert sum(route.start_time == request.start_time for route in routes) == 1, "what follows waited for no placement"
    under = [span.span_id for worker in traced.workers for _, span in worker.called_under]
    assert len(under) == 6
    assert set(under) == {request.context.span_id}


async def test_a_route_that_found_nobody_says_why(traced: ToyRouter, exporter: InMemorySpanExporter) -> None:
    decode = ToyDecode("d0")
    decode.faults.refuse_reserve = True
    await traced.join(ToyPrefill("p0"), decode)
    with pytest.raises(grpc.aio.AioRpcError):
        await ask(traced, timeout_s=0.5)
    await traced.at_rest()
    request, (route,) = request_and_routes(exporter)
    assert route.attributes[names.ERROR_REASON] == request.attributes[names.ERROR_REASON] == "DEADLINE_EXCEEDED"


async def test_a_move_is_asked_for_under_the_request(traced: ToyRouter, exporter: InMemorySpanExporter) -> None:
    source, target = ToyDecode("d0"), ToyDecode("d1")
    await traced.join(source)
    asking = asyncio.create_task(ask(traced, max_tokens=200))
    await traced.until(lambda: source.tokens > 3)
    await traced.join(target)
    drain(traced, source)
    await asking
    request, _ = request_and_routes(exporter)
    called = {method: span for worker in (source, target) for method, span in worker.called_under}
    assert set(called) == {"Admit", "Reserve", "Move"}
    assert {span.span_id for span in called.values()} == {request.context.span_id}
