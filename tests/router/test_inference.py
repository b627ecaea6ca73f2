"""The public service: what is refused and how, text and stop strings, words and numbers, the operator's view."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Callable

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from legato.v1 import common_pb2, inference_pb2
from router.meter import quantiles
from service.status import error_from_rpc
from service.tokenizer import Tokenizer
from spec.errors import ContextTooLong, InvalidParameter, NoWorkers, RequestError, UnknownModel
from tests.router.toy_cluster import EOS, VOCAB, ToyDecode, ToyPrefill, ToyRouter, next_token, whole_answer

Response = inference_pb2.GenerateResponse


def sampling(**more: object) -> common_pb2.SamplingParams:
    given = {"max_tokens": 20, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 3, **more}
    return common_pb2.SamplingParams(**{key: value for key, value in given.items() if value is not None})


def generate(text: str | None = "hello", ids: list[int] | None = None, model: str = "", **more: object):  # type: ignore[no-untyped-def]
    options = inference_pb2.AnswerOptions(
        **{key: more.pop(key) for key in list(more) if key in inference_pb2.AnswerOptions.DESCRIPTOR.fields_by_name}
    )
    options.sampling.CopyFrom(sampling(**more))
    prompt = {"token_ids": inference_pb2.TokenIds(ids=ids)} if ids is not None else {"text": text}
    return inference_pb2.GenerateRequest(model=model, options=options, **prompt)


def chat(*messages: dict[str, str]) -> inference_pb2.ChatRequest:
    return inference_pb2.ChatRequest(
        messages=[inference_pb2.ChatMessage(**message) for message in messages],
        options=inference_pb2.AnswerOptions(sampling=sampling()),
    )


async def responses(
    router: ToyRouter, asked: inference_pb2.GenerateRequest | inference_pb2.ChatRequest
) -> list[Response]:
    chat = isinstance(asked, inference_pb2.ChatRequest)
    try:
        return [response async for response in (router.stub.Chat if chat else router.stub.Generate)(asked, timeout=20)]
    except grpc.aio.AioRpcError as rpc_error:
        raise error_from_rpc(rpc_error) from None


def text_of(read: list[Response]) -> str:
    return "".join(response.piece.text + response.finished.text for response in read)


def tokens_of(read: list[Response]) -> list[int]:
    return [token.token_id for response in read for token in response.piece.tokens]


async def test_the_end_token_is_no_text_even_where_the_tokenizer_says_nothing_of_it(tokenizer: Tokenizer) -> None:
    definition = json.loads(tokenizer.definition)
    definition["added_tokens"][0]["special"] = False
    plain = Tokenizer(Backend.from_str(json.dumps(definition)), {})
    asked = [generate(ids=[7], seed=seed) for seed in range(40)]
    answers = [whole_answer([7], each.options.sampling) for each in asked]
    asked, answer = next(pair for pair in zip(asked, answers, strict=True) if pair[1][-1] == EOS and len(pair[1]) > 3)
    async with ToyRouter(plain) as router:
        await pools(router)
        read = await responses(router, asked)
        asked.options.sampling.ignore_eos = True
        going_on = await responses(router, asked)
    assert tokens_of(read) == answer
    assert text_of(read) == plain.decode(answer[:-1])
    assert text_of(going_on) == plain.decode(tokens_of(going_on))
    assert "<eos>" in text_of(going_on)


async def pools(router: ToyRouter) -> None:
    await router.join(ToyPrefill("p0"), ToyDecode("d0"))


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (generate(""), InvalidParameter, "prompt"),
        (generate(ids=[]), InvalidParameter, "prompt"),
        (
            inference_pb2.GenerateRequest(options=inference_pb2.AnswerOptions(sampling=sampling())),
            InvalidParameter,
            "prompt",
        ),
        (inference_pb2.GenerateRequest(text="x"), InvalidParameter, "max_tokens"),
        (generate(max_tokens=0), InvalidParameter, "max_tokens"),
        (generate(temperature=math.nan), InvalidParameter, "temperature"),
        (generate(temperature=-1.0), InvalidParameter, "temperature"),
        (generate(top_p=0.0), InvalidParameter, "top_p"),
        (generate(logit_bias={5: math.inf}), InvalidParameter, "logit_bias"),
        (generate(stop_token_ids=[VOCAB]), InvalidParameter, "stop_token_ids"),
        (generate(ids=[1, VOCAB, 2]), InvalidParameter, f"prompt holds {VOCAB}"),
        (generate(model="other"), UnknownModel, "served are toy"),
        (generate(ids=[1] * 400), ContextTooLong, "400 tokens"),
        (generate("x" * 10_000_000), ContextTooLong, "10000000 bytes"),
        (generate(n=65), InvalidParameter, "n must be at most"),
        (generate(stop=["x"] * 17), InvalidParameter, "stop"),
        (generate(stop=[""]), InvalidParameter, "stop"),
        (generate(stop=["x" * 2000]), InvalidParameter, "stop"),
        (generate(request_id="x" * 200), InvalidParameter, "request_id"),
        (generate(request_id="a\nb"), InvalidParameter, "request_id"),
        (generate(resume=[inference_pb2.TokenIds(ids=[VOCAB])]), InvalidParameter, "resume"),
        (generate(resume=[inference_pb2.TokenIds()] * 2), InvalidParameter, "resume"),
        (generate(ids=[1] * 390, max_tokens=20, forced_token_ids=[1] * 15), ContextTooLong, "390"),
        # Lists that are too long are refused unread: the wrong ids in them are not what is said.
        (generate(ids=[VOCAB] * 400), ContextTooLong, "400 tokens"),
        (generate(resume=[inference_pb2.TokenIds(ids=[VOCAB] * 401)]), ContextTooLong, "resume holds 401"),
        (generate(max_tokens=9999, forced_token_ids=[VOCAB] * 401), ContextTooLong, "forced_token_ids holds 401"),
        (generate(stop_token_ids=[VOCAB] * 65), InvalidParameter, "stop_token_ids holds 65"),
        (
            generate(logit_bias=dict.fromkeys(range(VOCAB, VOCAB + 1025), 1.0)),
            InvalidParameter,
            "logit_bias holds 1025",
        ),
        (chat({"role": "r" * 10_000_000, "content": "x"}), ContextTooLong, "10000001 bytes"),
        (chat(*[{}] * 401), ContextTooLong, "401 messages"),
        (
            inference_pb2.ChatRequest(options=inference_pb2.AnswerOptions(sampling=sampling())),
            InvalidParameter,
            "messages",
        ),
    ],
)
async def test_what_is_refused(router: ToyRouter, asked, error: type[RequestError], words: str) -> None:  # type: ignore[no-untyped-def]
    await pools(router)
    with pytest.raises(error, match=words) as raised:
        await responses(router, asked)
    assert type(raised.value) is error
    assert raised.value.details["request_id"]
    read = await responses(router, generate(ignore_eos=True))
    assert len(tokens_of(read)) == 20, "nothing else suffers"
    await router.at_rest()


async def test_words_and_numbers_that_are_too_many(router: ToyRouter) -> None:
    await pools(router)
    most = 400 * len("<eos>")  # a context full of the longest token
    for refused in (
        inference_pb2.TokenizeRequest(
            messages=inference_pb2.TokenizeRequest.ChatMessages(messages=[inference_pb2.ChatMessage()] * 401)
        ),
        inference_pb2.DetokenizeRequest(token_ids=[VOCAB] * (most + 1)),
    ):
        ask = router.stub.Tokenize if isinstance(refused, inference_pb2.TokenizeRequest) else router.stub.Detokenize
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ask(refused)
        error = error_from_rpc(raised.value)
        assert isinstance(error, InvalidParameter)
        assert "401 messages" in error.message or f"token_ids holds {most + 1} ids" in error.message
    longest = await router.stub.Tokenize(inference_pb2.TokenizeRequest(text="x" * most))
    back = await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=longest.token_ids))
    assert back.text == "x" * most


@pytest.mark.parametrize("messages", [[{"role": "r" * 101}], [{"content": "x" * 101}], [{}] * 4])
async def test_long_work_leaves_the_event_loop_free(
    router: ToyRouter, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, messages: list[dict[str, str]]
) -> None:
    """Roles and the number of messages are work too, not only what the messages say."""
    monkeypatch.setattr("router.inference.THREAD_FROM_CHARACTERS", 100)
    threads: list[int] = []

    def spied(name: str, work: Callable[..., object]) -> None:
        def noting(*arguments: object, **options: object) -> object:
            threads.append(threading.get_ident())
            return work(*arguments, **options)

        monkeypatch.setattr(tokenizer, name, noting)

    for name in ("chat", "encode", "decode"):
        spied(name, getattr(tokenizer, name))
    await pools(router)
    await router.stub.Tokenize(
        inference_pb2.TokenizeRequest(
            messages=inference_pb2.TokenizeRequest.ChatMessages(
                messages=[inference_pb2.ChatMessage(**message) for message in messages]
            )
        )
    )
    await router.stub.Tokenize(inference_pb2.TokenizeRequest(text="x" * 101))
    await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[1] * 101))
    assert len(threads) == 4, "chat, the encode in it, encode, decode"
    assert threading.get_ident() not in threads


async def test_no_worker_yet(router: ToyRouter) -> None:
    with pytest.raises(NoWorkers):
        await responses(router, generate())


async def test_text_in_and_text_out(router: ToyRouter, tokenizer: Tokenizer) -> None:
    await pools(router)
    asked = generate("the hand in there", max_tokens=60, ignore_eos=True)
    read = await responses(router, asked)
    prompt = tokenizer.encode("the hand in there")
    assert list(read[0].started.prompt_token_ids) == prompt
    assert tokens_of(read) == whole_answer(prompt, asked.options.sampling)
    assert text_of(read) == tokenizer.decode(tokens_of(read))


async def test_a_chat_goes_through_the_template(router: ToyRouter, tokenizer: Tokenizer) -> None:
    await pools(router)
    message = inference_pb2.ChatMessage(role="user", content="hello 😀")
    options = inference_pb2.AnswerOptions(sampling=sampling())
    read = await responses(router, inference_pb2.ChatRequest(messages=[message], options=options))
    assert list(read[0].started.prompt_token_ids) == tokenizer.encode("<user>hello 😀\n")


async def test_a_stop_string_ends_the_answer_and_the_decode_worker(router: ToyRouter, tokenizer: Tokenizer) -> None:
    decode = ToyDecode("d0", step_s=0.003)
    await router.join(ToyPrefill("p0"), decode)
    whole = tokens_of(await responses(router, generate(ids=[9], max_tokens=300, ignore_eos=True)))
    text = tokenizer.decode(whole)
    stop = re.search(r"[!-~]{2}", text[20:])[0]  # whole characters: half ones are U+FFFD only where the text ends
    at = text.index(stop)
    drawn_before = decode.tokens
    read = await responses(router, generate(ids=[9], max_tokens=300, ignore_eos=True, stop=[stop, "never" * 9]))
    finished = read[-1].finished
    assert text_of(read) == text[:at]
    assert finished.stop_string == stop
    assert finished.reason == common_pb2.FINISH_REASON_STOP
    used = tokens_of(read)
    assert whole[: len(used)] == used
    assert stop in tokenizer.decode(used)
    assert stop not in tokenizer.decode(used[:-1])
    assert finished.usage.completion_tokens == len(used)
    await router.at_rest()
    assert decode.tokens - drawn_before < 299, "the decode worker went on to the end"
    again = generate(ids=[9], max_tokens=300, ignore_eos=True, stop=[stop], resume=[inference_pb2.TokenIds(ids=used)])
    resumed = await responses(router, again)
    assert tokens_of(resumed) == []
    assert resumed[-1].finished.stop_string == stop


async def test_resume_behind_the_end_only_finishes(router: ToyRouter) -> None:
    await pools(router)
    read = await responses(router, generate(ids=[1], resume=[inference_pb2.TokenIds(ids=[5, EOS])]))
    assert tokens_of(read) == []
    assert read[-1].finished.reason == common_pb2.FINISH_REASON_STOP
    assert read[-1].finished.route.attempts == 0


async def test_max_tokens_is_cut_to_the_context(router: ToyRouter) -> None:
    await pools(router)
    read = await responses(router, generate(ids=[1] * 395, max_tokens=1000, ignore_eos=True))
    assert len(tokens_of(read)) == 5
    assert read[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH


async def test_a_seed_is_drawn_where_none_is_given(router: ToyRouter) -> None:
    await pools(router)
    reads = [await responses(router, generate(ids=[1], seed=None, max_tokens=4, ignore_eos=True)) for _ in range(2)]
    seeds = [read[0].started.seed for read in reads]
    assert seeds[0] != seeds[1]
    for seed, read in zip(seeds, reads, strict=True):
        assert tokens_of(read)[0] == next_token(seed, [1])


async def test_words_and_numbers(router: ToyRouter, tokenizer: Tokenizer) -> None:
    await pools(router)
    text = "the 😀 and " * 3000
    long = await router.stub.Tokenize(inference_pb2.TokenizeRequest(text=text[:100]))
    assert list(long.token_ids) == tokenizer.encode(text[:100])
    back = await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=long.token_ids))
    assert back.text == text[:100]
    messages = inference_pb2.TokenizeRequest.ChatMessages(
        messages=[inference_pb2.ChatMessage(role="user", content="a")]
    )
    chat = await router.stub.Tokenize(inference_pb2.TokenizeRequest(messages=messages))
    assert list(chat.token_ids) == tokenizer.encode("<user>a\n")
    model = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models[0]
    assert (model.id, model.revision, model.max_context_tokens, model.vocab_size, model.chat) == (
        "toy",
        "r1",
        400,
        VOCAB,
        True,
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await router.stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=[VOCAB]))
    assert isinstance(error_from_rpc(refused.value), InvalidParameter)


async def test_the_operators_view(router: ToyRouter) -> None:
    await pools(router)
    asking = asyncio.create_task(responses(router, generate(ids=[1], max_tokens=300, ignore_eos=True)))
    await router.until(lambda: router.registry.workers["d0"].charged_tokens > 5)
    view = await router.cluster_stub.GetCluster(inference_pb2.GetClusterRequest())
    assert [worker.worker_id for worker in view.workers] == ["d0", "p0"]
    assert view.workers[0].charged_tokens > 5
    assert view.router.running_requests == 1
    await asking
    await router.at_rest()
    view = await router.cluster_stub.GetCluster(inference_pb2.GetClusterRequest())
    assert (view.router.finished_requests, view.router.failed_requests) == (1, 0)
    assert view.router.ttft_s.count == 1
    assert view.router.itl_s.count > 200
    assert {worker.state for worker in view.workers} == {"ready"}


@given(st.lists(st.floats(0, 100), min_size=1))
def test_quantiles_are_values_that_were_measured(seconds: list[float]) -> None:
    found = quantiles(seconds)
    assert {found.p50, found.p90, found.p99} <= set(seconds)
    assert sum(value <= found.p90 for value in seconds) >= 0.9 * len(seconds)
    assert sum(value < found.p90 for value in seconds) <= 0.9 * len(seconds)
    assert found.count == len(seconds)
