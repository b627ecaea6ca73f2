"""KV that was evicted comes back from host memory or disk, is not computed again, and the logits are the same (P1)."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, cluster
from forced import check_forced
from tiny_llama import SHAPES, load_reference, make_llama

SHAPE = SHAPES[0]
DRAW = random.Random(6)
PROMPT, OTHER, ANSWER = (DRAW.choices(range(3, SHAPE.vocab_size), k=count) for count in (150, 370, 12))
FULL = 144  # of the prompt's tokens, in blocks of 16
ENGINE = {"num_blocks": 24, "max_step_tokens": 64, "max_sequences": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPE)


def totals(running: Cluster, worker_id: str) -> dict[str, int]:
    return running.workers[worker_id].core.all_totals()


async def ask(running: Cluster, prompt: list[int]) -> Any:
    return await running.client.generate(prompt, max_tokens=4, temperature=0.0, ignore_eos=True)


async def evict(running: Cluster) -> None:
    """What is in the KV memory of both workers is given to others, once it is copied."""
    await running.assert_as_at_start()
    await ask(running, OTHER)
    await running.assert_as_at_start()


@pytest.mark.parametrize(("tier", "layout"), [("host", "tp1"), ("disk", "tp1"), ("disk", "tp2")])
async def test_a_prompt_served_again_after_its_eviction(
    model: Path, redis_url: str, tmp_path: Path, tier: str, layout: str
) -> None:
    sizes = {"host_bytes": "8MiB"} if tier == "host" else {"disk_folder": str(tmp_path / "kv"), "disk_bytes": "8MiB"}
    async with cluster(
        model, redis_url, engine=ENGINE, prefill_engine={"layout": layout, "block_tokens": 16}, kv_tiers=sizes
    ) as running:
        reference = load_reference(model)
        await check_forced(running, reference, SHAPE.vocab_size, PROMPT, ANSWER)
        await evict(running)
        before = {name: totals(running, name) for name in running.workers}
        assert before["prefill-0"]["evictions"] > 0
        found = await ask(running, PROMPT)
        assert found.route.prefill_cached_tokens == FULL
        assert found.route.transfer.skipped_tokens == FULL
        for name in running.workers:
            after = totals(running, name)
            assert after[f"{tier}_tier_hits"] - before[name][f"{tier}_tier_hits"] == FULL // 16
            assert after["tier_loaded_bytes"] > 0
            assert after["tier_dropped"] == 0
        await evict(running)
        await check_forced(running, reference, SHAPE.vocab_size, PROMPT, ANSWER)
        await running.assert_as_at_start()


async def test_the_next_start_finds_the_files_and_not_those_that_were_touched(
    model: Path, redis_url: str, tmp_path: Path
) -> None:
    sizes = {"disk_folder": str(tmp_path / "kv"), "disk_bytes": "8MiB"}
    async with cluster(model, redis_url, engine=ENGINE, kv_tiers=sizes) as running:
        expected = (await ask(running, PROMPT)).token_ids
        await running.assert_as_at_start()
    async with cluster(model, redis_url, engine=ENGINE, kv_tiers=sizes) as running:
        again = await ask(running, PROMPT)
        assert again.token_ids == expected
        assert (again.route.prefill_cached_tokens, again.route.transfer.skipped_tokens) == (FULL, FULL)
        await running.assert_as_at_start()
        prefix = running.workers["prefill-0"].core.scheduler.schedulers[0].prefix
        fourth = prefix.hashes(PROMPT)[3].hex()
    for slot in ("0", "1"):
        path = tmp_path / "kv" / slot / fourth
        data = bytearray(path.read_bytes())
        data[-7] ^= 0x40
        path.write_bytes(data)
    async with cluster(model, redis_url, engine=ENGINE, kv_tiers=sizes) as running:
        again = await ask(running, PROMPT)
        assert again.token_ids == expected
        assert (again.route.prefill_cached_tokens, again.route.transfer.skipped_tokens) == (48, 48)
        assert [totals(running, name)["tier_dropped"] for name in running.workers] == [1, 1]
        await running.assert_as_at_start()
    async with cluster(model, redis_url, engine={**ENGINE, "kv_dtype": "int8"}, kv_tiers=sizes) as running:
        again = await ask(running, PROMPT)
        assert again.route.prefill_cached_tokens == 0
        assert totals(running, "prefill-0")["tier_dropped"] > 0


async def test_requests_of_one_prefix_at_once_and_one_that_wants_all_of_it_computed(
    model: Path, redis_url: str
) -> None:
    async with cluster(
        model, redis_url, engine={**ENGINE, "num_blocks": 48}, kv_tiers={"host_bytes": "8MiB"}
    ) as running:
        expected = (await ask(running, PROMPT)).token_ids
        for _ in range(3):
            await running.assert_as_at_start()
            await ask(running, DRAW.choices(range(3, 400), k=480))
        await running.assert_as_at_start()
        before = totals(running, "prefill-0")
        found = await asyncio.gather(*(ask(running, PROMPT) for _ in range(4)))
        assert {each.token_ids for each in found} == {expected}
        assert {each.route.prefill_cached_tokens for each in found} == {FULL}
        assert totals(running, "prefill-0")["host_tier_hits"] - before["host_tier_hits"] == FULL // 16, (
            "once, not four times"
        )
        await running.assert_as_at_start()
        await ask(running, DRAW.choices(range(3, 400), k=480))
        hits = totals(running, "prefill-0")["host_tier_hits"]
        scored = await running.client.generate(PROMPT, max_tokens=1, prompt_logprobs=2, temperature=0.0)
        assert len(scored.prompt_logprobs) == len(PROMPT) - 1
        assert totals(running, "prefill-0")["host_tier_hits"] == hits
        await running.assert_as_at_start()
