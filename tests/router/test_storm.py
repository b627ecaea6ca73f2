"""Many requests, clients that leave, workers that fail, die and come back, at random moments; each seed is a storm."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from legato.v1 import common_pb2, inference_pb2
from service.status import error_from_rpc
from service.tokenizer import Tokenizer
from spec.errors import ClusterError, DigestMismatch, HandoffError, OutOfBlocks, TransferFailed, WorkerLost
from tests.router.toy_cluster import ToyDecode, ToyPrefill, ToyRouter, whole_answer

REQUESTS = 60


def asked(index: int, chance: random.Random) -> inference_pb2.GenerateRequest:
    sampling = common_pb2.SamplingParams(
        max_tokens=chance.randint(1, 40),
        temperature=1.0,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=index,
        ignore_eos=chance.random() < 0.5,
    )
    prompt = [chance.randrange(256) for _ in range(chance.randint(1, 60))]
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt), options=inference_pb2.AnswerOptions(sampling=sampling)
    )


async def client(router: ToyRouter, index: int, chance: random.Random) -> str:
    """How it ended: "whole", "left" or the error's name. Every token it got is the right one at the right index."""
    request = asked(index, chance)
    expected = whole_answer(list(request.token_ids.ids), request.options.sampling)
    leaves_after = chance.randint(0, 20) if chance.random() < 0.3 else None
    await asyncio.sleep(chance.random() * 0.3)
    call = router.stub.Generate(request, timeout=15)
    tokens: list[int] = []
    try:
        async for response in call:
            if response.HasField("piece"):
                assert response.piece.first_index == len(tokens)
                tokens += [token.token_id for token in response.piece.tokens]
                assert tokens == expected[: len(tokens)]
            if leaves_after is not None and len(tokens) >= leaves_after:
                call.cancel()
                return "left"
    except grpc.aio.AioRpcError as rpc_error:
        error = error_from_rpc(rpc_error)
        assert isinstance(error, ClusterError | HandoffError), error
        return error.reason
    assert tokens == expected
    return "whole"


async def trouble(router: ToyRouter, chance: random.Random) -> None:
    """Plants a fault every few milliseconds; a worker that dies comes back as a new process of the same name."""
    while True:
        await asyncio.sleep(chance.random() * 0.03)
        worker = chance.choice(router.workers)
        if isinstance(worker, ToyPrefill):
            error = chance.choice([WorkerLost("planted"), TransferFailed("planted")])
            setattr(worker.faults, chance.choice(["error_before_first_once", "error_after_first_once"]), error)
            if chance.random() < 0.5:
                worker.faults.handoff_error_once = TransferFailed("planted")
        else:
            error = chance.choice([DigestMismatch("planted"), OutOfBlocks("planted")])
            worker.faults.error_after_tokens_once = (chance.randint(1, 10), error)
            worker.faults.say_twice = chance.random() < 0.3
        if chance.random() < 0.1:
            again = type(worker)(worker.record.worker_id)
            router.workers.remove(worker)
            await worker.kill()
            await again.start()
            router.workers.append(again)
            router.apply()


@pytest.mark.parametrize("seed", range(4))
async def test_storm(tokenizer: Tokenizer, seed: int) -> None:
    chance = random.Random(seed)
    async with ToyRouter(tokenizer, max_waiting=REQUESTS) as router:
        await router.join(*(ToyPrefill(f"p{i}") for i in range(3)), *(ToyDecode(f"d{i}", 60) for i in range(3)))
        storm = asyncio.create_task(trouble(router, random.Random(seed)))
        clients = (client(router, index, random.Random(chance.random())) for index in range(REQUESTS))
        ends = await asyncio.gather(*clients)
        storm.cancel()
        await asyncio.gather(storm, return_exceptions=True)
        assert ends.count("whole") > REQUESTS / 4, ends
        assert "left" in ends
        assert "DEADLINE_EXCEEDED" not in ends, "something hung"
        await router.at_rest()
