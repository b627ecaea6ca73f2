"""A hand-over that fails leaves what had landed: another prefill worker goes on from there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from breaking import break_once
from cluster import Cluster, cluster
from tiny_llama import SHAPES, make_llama

PROMPT = random.Random(8).choices(range(3, 400), k=150)
CHUNKS_SENT = 3  # of 32 tokens, before it breaks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


async def greedy(running: Cluster) -> Any:
    return await running.client.generate(PROMPT, max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize(("digest", "block_tokens", "held"), [("always", 16, 96), ("always", 24, 96), ("off", 16, 0)])
async def test_chunks_that_had_landed_are_not_sent_again(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, digest: str, block_tokens: int, held: int
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
        sent = break_once(monkeypatch, CHUNKS_SENT)
        answer = await greedy(running)
        assert answer.token_ids == expected
        assert answer.route.attempts == 2
        assert sent[: CHUNKS_SENT + 1] == [32, 64, 96, -1]
        assert answer.route.transfer.skipped_tokens == held
        token_0_is_out = answer.route.transfer.sent_tokens - (len(PROMPT) - held)
        assert token_0_is_out in (0, 1)
        assert answer.route.decode_worker_id == "decode-0"
        assert answer.route.prefill_worker_id == "prefill-1"
        await running.assert_as_at_start()
