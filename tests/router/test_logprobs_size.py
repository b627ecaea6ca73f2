"""How many log-probabilities may be asked for: what one message of the answer then holds goes over the wire."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from legato.v1 import common_pb2, inference_pb2
from service.config import MAX_MESSAGE_BYTES
from service.status import error_from_rpc
from spec.errors import InvalidParameter
from spec.sampling import MAX_MESSAGE_LOGPROBS, SamplingParams, check_logprobs_fit
from tests.router.toy_cluster import ToyDecode, ToyPrefill, ToyRouter

LONGEST_ID = (1 << 32) - 1
SMOLLM2 = 49152


def message(tokens: int, logprobs: int) -> inference_pb2.GenerateResponse:
    entry = common_pb2.TokenLogprobs(
        logprob=-1.5, top_token_ids=[LONGEST_ID] * logprobs, top_logprobs=[-2.5] * logprobs
    )
    return inference_pb2.GenerateResponse(piece=inference_pb2.GenerateResponse.Piece(prompt_logprobs=[entry] * tokens))


@settings(max_examples=50)
@given(st.integers(0, 40), st.one_of(st.integers(0, 40), st.integers(0, 3000)))
def test_a_logprob_takes_ten_bytes_at_most(tokens: int, logprobs: int) -> None:
    empty = message(0, 0).ByteSize()
    assert message(tokens, logprobs).ByteSize() - empty <= 10 * tokens * (logprobs + 1) + 8


@pytest.mark.parametrize("tokens", [1, 64, MAX_MESSAGE_LOGPROBS // SMOLLM2, 1 << 16])
def test_the_most_that_is_taken_goes_into_half_a_message(tokens: int) -> None:
    """The other half is for the prompt's ids and the text."""
    logprobs = MAX_MESSAGE_LOGPROBS // tokens - 1
    check_logprobs_fit(SamplingParams(prompt_logprobs=logprobs), tokens)
    assert message(tokens, logprobs).ByteSize() <= MAX_MESSAGE_BYTES / 2


@pytest.mark.parametrize(
    ("asked", "prompt_tokens"),
    [
        ({"prompt_logprobs": 431}, 90),
        ({"logprobs": SMOLLM2, "max_tokens": 100_000}, 8000),
        ({"logprobs": 256_000, "prompt_logprobs": 0}, 1_000_000),
        ({"prompt_logprobs": 20}, 99_000),
        ({}, 10_000_000),
    ],
)
def test_what_fits(asked: dict[str, int], prompt_tokens: int) -> None:
    check_logprobs_fit(SamplingParams(**asked), prompt_tokens)


@pytest.mark.parametrize(
    ("asked", "prompt_tokens", "words"),
    [
        ({"prompt_logprobs": SMOLLM2}, 43, f"prompt_logprobs of {SMOLLM2} for 43 tokens makes {43 * 49153} "),
        ({"prompt_logprobs": 0}, MAX_MESSAGE_LOGPROBS + 1, "prompt_logprobs of 0"),
        ({"logprobs": MAX_MESSAGE_LOGPROBS}, 1, f"logprobs of {MAX_MESSAGE_LOGPROBS} for 1 tokens"),
        ({"logprobs": 1 << 20, "prompt_logprobs": 1}, 1 << 19, "logprobs of"),
    ],
)
def test_what_does_not_fit(asked: dict[str, int], prompt_tokens: int, words: str) -> None:
    with pytest.raises(InvalidParameter, match=words) as raised:
        check_logprobs_fit(SamplingParams(**asked), prompt_tokens)
    assert f"at most {MAX_MESSAGE_LOGPROBS} " in raised.value.message
    assert raised.value.details["field"] in asked


async def test_the_router_refuses_before_a_worker_hears_of_it(
    router: ToyRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spec.sampling.MAX_MESSAGE_LOGPROBS", 100)
    prefill = ToyPrefill("p0")
    await router.join(prefill, ToyDecode("d0"))

    async def ask(prompt_logprobs: int) -> int:
        sampling = common_pb2.SamplingParams(max_tokens=2, seed=1, prompt_logprobs=prompt_logprobs)
        asked = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=[1] * 10),
            options=inference_pb2.AnswerOptions(sampling=sampling),
        )
        return sum([len(response.piece.prompt_logprobs) async for response in router.stub.Generate(asked)])

    assert await ask(9) == 9
    computed = prefill.computed_tokens
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await ask(10)
    error = error_from_rpc(raised.value)
    assert isinstance(error, InvalidParameter)
    assert "prompt_logprobs of 10 for 10 tokens makes 110 " in error.message
    assert prefill.computed_tokens == computed
    await router.at_rest()
