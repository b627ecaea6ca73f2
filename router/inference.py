"""legato.v1.Inference: what clients call.

    request ──▶ model ──▶ options checked ──▶ text to tokens ──▶ prompt checked ──▶ one Answer per choice ──▶ responses

Choice 0 goes first; the others follow when it has its first token, for then the prompt's blocks are in prefix caches.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import grpc

from legato.v1 import inference_pb2, inference_pb2_grpc
from router import validation
from router.answer import Answer
from router.constraints import Constraints
from router.journey import Deadline, Journey
from router.ledger import Ledger
from router.meter import Meter
from router.placer import Placer
from router.registry import Model, Registry
from service import logs
from service.tracing import Spans
from spec.errors import Draining, InvalidParameter, LegatoError
from spec.sampling import check_logprobs_fit, check_token_ids
from telemetry import names

THREAD_FROM_CHARACTERS = 8192  # tokenising more than this would hold everyone's tokens up
MESSAGE_CHARACTERS = 32  # a message through the chat template takes about as long as tokenising so many
# The typed error leaves this long before the client's own clock ends the call; a twentieth of it where that is less.
DEADLINE_MARGIN_S = 0.05

Response = inference_pb2.GenerateResponse
Write = Callable[[Response], Awaitable[None]]
Result = TypeVar("Result")


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """`draining` is set when the router stops: what runs goes on, what is new is refused."""

    def __init__(
        self,
        registry: Registry,
        placer: Placer,
        constraints: Constraints,
        meter: Meter,
        spans: Spans,
        default_timeout_s: float,
    ) -> None:
        self.draining = False
        self.meter = meter
        self._registry = registry
        self._placer = placer
        self._constraints = constraints
        self._spans = spans
        self._default_timeout_s = default_timeout_s

    # -- answers ------------------------------------------------------------------------------------------------------

    async def Generate(self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        async def prompt(model: Model) -> Sequence[int]:
            match request.WhichOneof("prompt"):
                case "text":
                    return await self._tokenise(request.text, model)
                case "token_ids":
                    return request.token_ids.ids
            raise InvalidParameter("is missing: text or token_ids", field="prompt")

        await self._serve(request.model, request.options, prompt, context)

    async def Chat(self, request: inference_pb2.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        async def prompt(model: Model) -> list[int]:
            return await self._tokenise_chat(request.messages, model)

        await self._serve(request.model, request.options, prompt, context)

    async def _serve(
        self,
        model_id: str,
        options: inference_pb2.AnswerOptions,
        prompt: Callable[[Model], Awaitable[Sequence[int]]],
        context: grpc.aio.ServicerContext,
    ) -> None:
        request_id = options.request_id or secrets.token_hex(8)
        received_s, received_ns = time.monotonic(), time.time_ns()
        deadline = Deadline(self._time_left_s(context))
        self.meter.running_requests += 1
        reason = "CANCELLED"  # unless it ends otherwise
        try:
            attributes = {names.REQUEST_ID: request_id}
            with (
                logs.request_id(request_id),
                self._spans.span(names.SPAN_REQUEST, attributes, start_ns=received_ns),
            ):
                if self.draining:
                    raise Draining("this router is stopping")
                model = self._registry.model(model_id, validation.check_adapter(options.adapter))
                context_tokens = self._registry.context_tokens(model)
                params = validation.check_options(options, model, context_tokens)
                if params.constraint is not None:
                    await self._constraints.check(params.constraint, model)
                given = await prompt(model)
                validation.check_prompt(given, model, context_tokens)
                check_logprobs_fit(params, len(given))
                token_ids = list(given)
                asked = validation.asked(options, token_ids, context_tokens)
                answers = self._answers(asked, model, request_id, deadline, received_s, received_ns)
                started = Response.Started(
                    request_id=request_id,
                    model=model.model_id,
                    prompt_token_ids=token_ids,
                    seed=asked.sampling.seed,
                )
                await _write_all(answers, started, context.write)
            reason = ""
        except LegatoError as error:
            error.details.setdefault("request_id", request_id)
            reason = error.reason
            raise
        finally:
            self.meter.running_requests -= 1
            self.meter.ended(reason, time.monotonic() - received_s)

    def _answers(
        self,
        asked: validation.Asked,
        model: Model,
        request_id: str,
        deadline: Deadline,
        received_s: float,
        received_ns: int,
    ) -> list[Answer]:
        arrival = self._placer.line.arrive()
        nonce = secrets.token_hex(4)  # a client may send the same request again while the first is still running
        answers = []
        for choice in range(asked.choices):
            sampling, resume = asked.sampling_of(choice), asked.resume[choice]
            journey = Journey(
                placer=self._placer,
                model=model,
                name=f"{request_id}-{nonce}.{choice}",
                prompt_token_ids=asked.prompt_token_ids,
                sampling=sampling,
                resume=resume,
                arrival=arrival,
                deadline=deadline,
                ledger=Ledger(self._registry.router_id, received_ns),
                spans=self._spans,
                follows=choice > 0,
            )
            prompt_tokens = len(asked.prompt_token_ids)
            answers.append(
                Answer(choice, journey, model, sampling, asked.stops, prompt_tokens, resume, received_s, self.meter)
            )
        return answers

    def _time_left_s(self, context: grpc.aio.ServicerContext) -> float:
        left_s: float | None = context.time_remaining()
        if left_s is None:
            return self._default_timeout_s
        return max(0.0, left_s - min(DEADLINE_MARGIN_S, left_s / 20))

    # -- words and numbers --------------------------------------------------------------------------------------------

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        model = self._registry.model(request.model)
        match request.WhichOneof("input"):
            case "text":
                token_ids = await self._tokenise(request.text, model)
            case "messages":
                token_ids = await self._tokenise_chat(request.messages.messages, model)
            case _:
                raise InvalidParameter("is missing: text or messages", field="input")
        return inference_pb2.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        model = self._registry.model(request.model)
        validation.check_ids_size(request.token_ids, model, self._registry.context_tokens(model))
        text = await _maybe_in_thread(len(request.token_ids), lambda: _text_of(request.token_ids, model))
        return inference_pb2.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(
            models=[
                inference_pb2.ListModelsResponse.Model(
                    id=model.model_id,
                    revision=model.identity.revision,
                    max_context_tokens=self._registry.context_tokens(model),
                    vocab_size=model.vocab_size,
                    chat=model.tokenizer.has_chat_template,
                    adapters=self._registry.adapters(model),
                )
                for model in self._registry.models()
            ]
        )

    async def _tokenise(self, text: str, model: Model) -> list[int]:
        characters = validation.check_text_size([text], model, self._registry.context_tokens(model))
        return await _maybe_in_thread(characters, lambda: model.tokenizer.encode(text))

    async def _tokenise_chat(self, messages: Sequence[inference_pb2.ChatMessage], model: Model) -> list[int]:
        context_tokens = self._registry.context_tokens(model)
        validation.check_messages(messages, context_tokens)
        plain = [{"role": message.role, "content": message.content} for message in messages]
        texts = (text for message in plain for text in message.values())
        characters = validation.check_text_size(texts, model, context_tokens)
        size = characters + len(plain) * MESSAGE_CHARACTERS
        return await _maybe_in_thread(size, lambda: model.tokenizer.chat(plain))


def _text_of(token_ids: Sequence[int], model: Model) -> str:
    check_token_ids(token_ids, model.vocab_size, field="token_ids")
    return model.tokenizer.decode(token_ids)


async def _maybe_in_thread(size: int, work: Callable[[], Result]) -> Result:
    return await asyncio.to_thread(work) if size > THREAD_FROM_CHARACTERS else work()


async def _write_all(answers: list[Answer], started: Response.Started, write: Write) -> None:
    """All responses of all choices, `started` with the first. The first error ends them all."""
    if len(answers) == 1:
        await _write(answers[0].responses(), write, started)
        return
    begun, writing = asyncio.Event(), asyncio.Lock()  # a stream takes one message at a time

    async def write_first(response: Response) -> None:
        await write_one(response)
        begun.set()

    async def write_one(response: Response) -> None:
        async with writing:
            await write(response)

    async def follow(answer: Answer) -> None:
        await begun.wait()
        await _write(answer.responses(), write_one)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_write(answers[0].responses(), write_first, started))
            for answer in answers[1:]:
                group.create_task(follow(answer))
    except BaseExceptionGroup as group_error:
        ours = (error for error in group_error.exceptions if isinstance(error, LegatoError))
        raise next(ours, group_error.exceptions[0]) from None


async def _write(
    responses: AsyncGenerator[Response, None], write: Write, started: Response.Started | None = None
) -> None:
    async with contextlib.aclosing(responses):
        async for response in responses:
            if started is not None:
                response.started.CopyFrom(started)
                started = None
            await write(response)
