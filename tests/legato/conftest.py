"""A real gRPC server in a thread of its own, whose model is a function: token i of the answer = f(seed, i)."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from legato.v1 import common_pb2, inference_pb2, inference_pb2_grpc


def token_at(seed: int, index: int) -> int:
    return (seed * 31 + index * 7) % 26


def text_of(token_ids: list[int]) -> str:
    return "".join(chr(97 + token_id) for token_id in token_ids)


@dataclasses.dataclass
class Script:
    """What the server does with one call; the default is to answer it well."""

    fail_after_tokens: int | None = None  # break after this many tokens of this call
    status: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    reason: str = ""  # with an ErrorInfo of this reason
    info: dict[str, str] = dataclasses.field(default_factory=dict)
    skip_index: int | None = None  # lose this token
    repeat_index: int | None = None  # send this token twice
    no_finish: bool = False
    hang_after_tokens: int | None = None
    delay_s: float = 0.0  # before the second token
    clock_error_ns: int = 0
    held_back: str = ""


class ToyRouter(inference_pb2_grpc.InferenceServicer, inference_pb2_grpc.ClusterServicer):
    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.cancelled = threading.Event()

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> AsyncIterator[Any]:
        prompt = list(request.token_ids.ids) or list(request.text.encode())
        async for response in self._answer(request, prompt, context):
            yield response

    async def Chat(self, request: inference_pb2.ChatRequest, context: Any) -> AsyncIterator[Any]:
        prompt = list("".join(message.content for message in request.messages).encode())
        async for response in self._answer(request, prompt, context):
            yield response

    async def _answer(self, request: Any, prompt: list[int], context: Any) -> AsyncIterator[Any]:
        script = self._begin(request, context)
        whole: list[bool] = []
        context.add_done_callback(lambda _: None if whole else self.cancelled.set())
        options, sampling = request.options, request.options.sampling
        seed = sampling.seed if sampling.HasField("seed") else 5
        message = inference_pb2.GenerateResponse
        yield message(
            started=message.Started(request_id=options.request_id, model="toy", prompt_token_ids=prompt, seed=seed)
        )
        sent = 0
        stages = common_pb2.StageTimes(prefill_queued_ns=time.time_ns() + script.clock_error_ns)
        for choice in range(max(1, options.n)):
            first = len(options.resume[choice].ids) if options.resume else 0
            assert not options.resume or list(options.resume[choice].ids) == [
                token_at(seed + choice, index) for index in range(first)
            ]
            for index in range(first, sampling.max_tokens):
                await self._maybe_fail(script, sent, context)
                _pass_boundaries(stages, index, script)
                if index == 1:
                    await asyncio.sleep(script.delay_s)
                token_id = token_at(seed + choice, index)
                sent += 1
                if index == script.skip_index:
                    continue
                piece = message.Piece(
                    choice=choice,
                    first_index=index,
                    tokens=[_token(token_id, sampling)],
                    text=text_of([token_id]),
                    stages=stages if index < 2 else None,
                )
                if sampling.HasField("prompt_logprobs") and choice == index == 0:
                    piece.prompt_logprobs.extend(common_pb2.TokenLogprobs(logprob=-token) for token in prompt[1:])
                for _ in range(2 if index == script.repeat_index else 1):
                    yield message(piece=piece)
            await self._maybe_fail(script, sent, context)
            if not script.no_finish:
                yield message(finished=_finished(choice, len(prompt), sampling.max_tokens, stages, script))
        whole.append(True)

    def _begin(self, request: Any, context: Any) -> Script:
        kept = type(request)()
        kept.CopyFrom(request)
        self.requests.append(kept)
        self.metadata.append({key: value for key, value in context.invocation_metadata() if isinstance(value, str)})
        return self.scripts.pop(0) if self.scripts else Script()

    async def _maybe_fail(self, script: Script, sent: int, context: Any) -> None:
        if script.hang_after_tokens == sent:
            await asyncio.sleep(60)
        if script.fail_after_tokens == sent:
            await _abort(script, context)

    async def Tokenize(self, request: inference_pb2.TokenizeRequest, context: Any) -> Any:
        script = self._begin(request, context)
        await self._maybe_fail(script, 0, context)
        text = request.text or "".join(message.content for message in request.messages.messages)
        return inference_pb2.TokenizeResponse(token_ids=text.encode())

    async def Detokenize(self, request: inference_pb2.DetokenizeRequest, context: Any) -> Any:
        return inference_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())

    async def ListModels(self, request: Any, context: Any) -> Any:
        model = inference_pb2.ListModelsResponse.Model(
            id="toy",
            revision="r1",
            max_context_tokens=99,
            vocab_size=26,
            adapters=[common_pb2.Adapter(name="poems", revision="0123456789")],
        )
        return inference_pb2.ListModelsResponse(models=[model])

    async def GetCluster(self, request: Any, context: Any) -> Any:
        view = inference_pb2.GetClusterResponse
        worker = view.WorkerView(worker_id="decode-0", role="decode", state="ready", total_blocks=8, free_blocks=6)
        router = view.RouterView(finished_requests=3, ttft_s=view.Quantiles(p50=0.1, p90=0.2, p99=0.3, count=3))
        return view(router_id="toy-router", workers=[worker], router=router)


def _pass_boundaries(stages: common_pb2.StageTimes, index: int, script: Script) -> None:
    now_ns = time.time_ns() + script.clock_error_ns
    if index == 0:
        stages.prefill_started_ns = stages.first_token_ns = now_ns
    elif index == 1:
        stages.handed_over_ns = stages.decode_started_ns = now_ns


def _token(token_id: int, sampling: common_pb2.SamplingParams) -> common_pb2.Token:
    if not sampling.HasField("logprobs"):
        return common_pb2.Token(token_id=token_id)
    top = list(range(sampling.logprobs))
    return common_pb2.Token(
        token_id=token_id,
        logprobs=common_pb2.TokenLogprobs(logprob=-0.5, top_token_ids=top, top_logprobs=[-1.0 - one for one in top]),
    )


def _finished(choice: int, prompt: int, tokens: int, stages: Any, script: Script) -> Any:
    return inference_pb2.GenerateResponse.Finished(
        choice=choice,
        reason=common_pb2.FINISH_REASON_LENGTH,
        usage=inference_pb2.Usage(prompt_tokens=prompt, completion_tokens=tokens),
        stages=stages,
        route=common_pb2.Route(
            router_id="toy-router",
            prefill_worker_id="prefill-0",
            decode_worker_id="decode-0",
            attempts=1,
            transfer=common_pb2.TransferStats(transport="memory", bytes=64, pieces=2, sent_tokens=prompt),
        ),
        text=script.held_back,
    )


async def _abort(script: Script, context: Any) -> None:
    if not script.reason:
        await context.abort(script.status, "scripted")
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=script.reason, domain="legato", metadata=script.info))
    status = status_pb2.Status(code=script.status.value[0], message=f"scripted {script.reason}", details=[packed])
    trailing = (("grpc-status-details-bin", status.SerializeToString()),)
    await context.abort(script.status, status.message, trailing)


class Running:
    """The server, its address, and what it saw."""

    def __init__(self) -> None:
        self.toy = ToyRouter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._server: Any = None
        self.port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._do(self._start())

    async def _start(self) -> None:
        self._server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(self.toy, self._server)
        inference_pb2_grpc.add_ClusterServicer_to_server(self.toy, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._do(self._server.stop(None))
            self._server = None

    def close(self) -> None:
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


@pytest.fixture
def make_router() -> Iterator[Callable[[], Running]]:
    running: list[Running] = []

    def make() -> Running:
        running.append(Running())
        return running[-1]

    yield make
    for one in running:
        one.close()


@pytest.fixture
def router(make_router: Callable[[], Running]) -> Running:
    return make_router()


@pytest.fixture
def script() -> type[Script]:
    return Script


@pytest.fixture
def expected() -> Callable[[int, int], list[int]]:
    """expected(seed, n): the first n tokens."""
    return lambda seed, count: [token_at(seed, index) for index in range(count)]
