"""A hand-over that fails leaves what had landed: another prefill worker goes on from there."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, cluster
from tiny_llama import SHAPES, make_llama

from spec.errors import TransferFailed
from worker.departures import Departures
from worker.receiver import Receiver

PROMPT = random.Random(8).choices(range(3, 400), k=150)
CHUNKS_SENT = 3  # of 32 tokens, before it breaks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first hand-over breaks before its fourth chunk is sent, once those before are checked by the receiver."""
    send, sent = Departures._send, []
    landed, checked = Receiver._landed, asyncio.Semaphore(0)

    async def break_once(departures: Departures, chunk: Any) -> None:
        if len(sent) == CHUNKS_SENT:
            for _ in range(CHUNKS_SENT):
                await checked.acquire()
            sent.append(-1)
            raise TransferFailed("planted")
        await send(departures, chunk)
        sent.append(chunk.end)

    async def counted(receiver: Receiver, chunk: Any) -> None:
        await landed(receiver, chunk)
        checked.release()

    monkeypatch.setattr(Departures, "_send", break_once)
    monkeypatch.setattr(Receiver, "_landed", counted)
    return sent


async def greedy(running: Cluster) -> Any:
    return await running.client.generate(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize(("digest", "block_tokens", "held"), [("always", 16, 96), ("always", 24, 96), ("off", 16, 0)])
async def test_chunks_that_had_landed_are_not_sent_again(
    model: Path, redis_url: str, breaking: list[int], digest: str, block_tokens: int, held: int
) -> None:
    """Without digests nothing is proven, and nothing is kept. The emptier decode worker is not preferred."""
    async with cluster(model, redis_url, prefill=0) as running:
        expected = (await greedy(running)).token_ids
    engine = {"max_step_tokens": 32, "max_sequences": 8}
    async with cluster(
        model,
        redis_url,
        prefill=2,
        decode=2,
        prefill_engine=engine,
        decode_engine={"block_tokens": block_tokens},
        handoff={"digest": digest},
    ) as running:
        answer = await greedy(running)
        assert answer.token_ids == expected
        assert answer.route.attempts == 2
        assert breaking[: CHUNKS_SENT + 1] == [32, 64, 96, -1]
        assert answer.route.transfer.skipped_tokens == held
        token_0_is_out = answer.route.transfer.sent_tokens - (len(PROMPT) - held)
        assert token_0_is_out in (0, 1)
        assert answer.route.decode_worker_id == "decode-0"
        assert answer.route.prefill_worker_id == "prefill-1"
        await running.assert_as_at_start()
