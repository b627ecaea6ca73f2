"""What clients of a cluster rely on: same seed, same tokens; nothing lost or left; typed errors; a ledger that sums."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from pathlib import Path

import grpc
import numpy as np
import pytest
from cluster import Cluster, cluster
from tiny_llama import SHAPES, load_reference, make_llama, reference_of

import legato
from legato.v1 import inference_pb2, inference_pb2_grpc
from service.status import error_from_rpc
from spec import errors

SHAPE = SHAPES[0]
SEEDED = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPE)


def prompts_of(draw: random.Random, count: int, longest: int = 120) -> list[list[int]]:
    return [[draw.randrange(3, SHAPE.vocab_size) for _ in range(draw.randint(1, longest))] for _ in range(count)]


async def seeded(running: Cluster, prompt: list[int], seed: int) -> tuple[int, ...]:
    return (await running.client.generate(prompt, seed=seed, **SEEDED)).token_ids


async def test_same_seed_same_tokens_alone_in_a_batch_on_one_pool_or_two(model: Path, redis_url: str) -> None:
    prompts = prompts_of(random.Random(1), 16)
    async with cluster(model, redis_url, prefill_engine={"max_step_tokens": 48, "max_sequences": 16}) as running:
        alone = [await seeded(running, prompt, seed) for seed, prompt in enumerate(prompts)]
        batch = await asyncio.gather(*(seeded(running, prompt, seed) for seed, prompt in enumerate(prompts)))
        several = await running.client.generate(prompts[0], seed=0, n=3, **SEEDED)
        again = await running.client.generate(prompts[0], seed=2, **SEEDED)
    async with cluster(model, redis_url, prefill=0) as running:
        one_pool = await asyncio.gather(*(seeded(running, prompt, seed) for seed, prompt in enumerate(prompts)))
    assert len(set(alone)) == 16
    assert batch == alone
    assert one_pool == alone
    assert several.choices[0].token_ids == alone[0]
    assert several.choices[2].token_ids == again.token_ids


async def test_five_hundred_requests_of_which_a_third_leaves(model: Path, redis_url: str) -> None:
    """The oracle is transformers: each answer that was kept must be greedy under its logits."""
    draw = random.Random(500)
    prompts = prompts_of(draw, 500, longest=60)
    leaves = [draw.random() < 1 / 3 for _ in prompts]
    in_flight = asyncio.Semaphore(32)
    reference = load_reference(model)

    async def one(running: Cluster, prompt: list[int], leave: bool) -> tuple[int, ...] | None:
        async with in_flight:
            if not leave:
                answer = await running.client.generate(prompt, max_tokens=12, temperature=0.0, ignore_eos=True)
                return answer.token_ids
            asked = asyncio.create_task(running.client.generate(prompt, max_tokens=200, ignore_eos=True))
            await asyncio.sleep(random.expovariate(1 / 0.05))
            asked.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asked
            return None

    engine = {"max_step_tokens": 64, "max_sequences": 32, "num_blocks": 160}
    async with cluster(model, redis_url, prefill=2, decode=2, engine=engine) as running:
        answers = await asyncio.gather(*(one(running, *work) for work in zip(prompts, leaves, strict=True)))
        await running.assert_as_at_start()
    kept = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer is not None]
    assert len(kept) == leaves.count(False)
    for prompt, answer in kept:
        rows = reference_of(reference, [*prompt, *answer])[len(prompt) - 1 : -1]
        drawn = rows[np.arange(len(answer)), list(answer)]
        assert len(answer) == 12
        assert (rows.max(axis=1) - drawn < 1e-4).all(), "not the likeliest token"


async def test_the_ledger_sums_to_what_the_client_measured(model: Path, redis_url: str) -> None:
    async with cluster(model, redis_url) as running:
        for length in (1, 40, 300):
            answer = await running.client.generate([7] * length, max_tokens=8, ignore_eos=True)
            ledger = answer.ledger
            stages = [
                ledger.route_s,
                ledger.queue_s,
                ledger.prefill_s,
                ledger.exposed_transfer_s,
                ledger.decode_queue_s,
                ledger.first_decode_step_s,
            ]
            assert all(stage >= 0 for stage in stages)
            assert math.isclose(sum(stages), ledger.second_token_s, abs_tol=1e-3)
            assert ledger.clock_shift_s < 1e-3, "no boundary had to be moved: all were measured where they belong"
            assert ledger.route_s + ledger.queue_s + ledger.prefill_s <= ledger.ttft_s + 1e-3
            assert ledger.prefill_s > 0 and ledger.first_decode_step_s > 0


BAD = {
    "empty prompt": ({"prompt": []}, legato.errors.InvalidParameter, "prompt"),
    "empty text": ({"prompt": ""}, legato.errors.InvalidParameter, "prompt"),
    "prompt longer than the context": ({"prompt": [5] * 600}, legato.errors.ContextTooLong, "512"),
    "max_tokens 0": ({"max_tokens": 0}, legato.errors.InvalidParameter, "max_tokens"),
    "max_tokens negative": ({"max_tokens": -1}, legato.errors.InvalidParameter, "max_tokens"),
    "NaN temperature": ({"temperature": math.nan}, legato.errors.InvalidParameter, "temperature"),
    "infinite temperature": ({"temperature": math.inf}, legato.errors.InvalidParameter, "temperature"),
    "top_p 0": ({"top_p": 0.0}, legato.errors.InvalidParameter, "top_p"),
    "unknown model": ({"model": "gpt-17"}, legato.errors.UnknownModel, "gpt-17"),
    "token id out of range": ({"prompt": [5, SHAPE.vocab_size]}, legato.errors.InvalidParameter, str(SHAPE.vocab_size)),
    "negative token id": ({"prompt": [5, -1]}, legato.errors.InvalidParameter, "-1"),
    "10 MB prompt": ({"prompt": "x" * 10_000_000}, legato.errors.ContextTooLong, "512"),
    "broken UTF-8 in a stop string": ({"stop": ["\ud800"]}, legato.errors.InvalidParameter, "stop"),
    "logprobs beyond the vocabulary": ({"logprobs": 100_000}, legato.errors.InvalidParameter, "logprobs"),
    "too many answers": ({"n": 10_000}, legato.errors.InvalidParameter, "n"),
    "bias on an unknown token": ({"logit_bias": {99_999: 1.0}}, legato.errors.InvalidParameter, "logit_bias"),
}


async def test_bad_input_gets_a_typed_error_and_nothing_else_suffers(model: Path, redis_url: str) -> None:
    async with cluster(model, redis_url) as running:
        good = asyncio.create_task(running.client.generate([9] * 30, max_tokens=150, temperature=0.0, ignore_eos=True))
        for name, (options, kind, word) in BAD.items():
            with pytest.raises(kind) as caught:
                await running.client.generate(**{"prompt": [5, 6, 7], "max_tokens": 4, **options})
            assert word in str(caught.value), f"{name}: {caught.value}"
            assert not caught.value.retryable, name
        assert len((await good).token_ids) == 150
        await running.assert_as_at_start()


async def test_bytes_that_are_no_message_get_a_typed_error(model: Path, redis_url: str) -> None:
    """A client that is not ours can put broken UTF-8 on the wire."""
    stop = b"ab"
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5, 6]), options=inference_pb2.AnswerOptions(stop=["ab"])
    )
    broken = request.SerializeToString().replace(stop, b"\xff\xfe")
    assert broken != request.SerializeToString()
    async with cluster(model, redis_url) as running, grpc.aio.insecure_channel(running.address) as channel:
        call = channel.unary_stream("/legato.v1.Inference/Generate")(broken)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert isinstance(error_from_rpc(caught.value), errors.InvalidParameter)
        stub = inference_pb2_grpc.InferenceStub(channel)
        assert (await stub.ListModels(inference_pb2.ListModelsRequest())).models
        await running.assert_as_at_start()


async def test_a_deadline_is_kept_and_typed(model: Path, redis_url: str) -> None:
    async with cluster(model, redis_url, engine={"max_context_tokens": 512}) as running:
        started_s = asyncio.get_running_loop().time()
        with pytest.raises(legato.errors.DeadlineExceeded):
            await asyncio.gather(
                *(
                    running.client.generate([5] * 100, max_tokens=400, ignore_eos=True, timeout_s=0.15)
                    for _ in range(24)
                )
            )
        assert asyncio.get_running_loop().time() - started_s < 5.0
        await running.assert_as_at_start()
