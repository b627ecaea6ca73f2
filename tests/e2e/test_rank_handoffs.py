"""Prefill and decode workers of unlike layouts, every rank a process: the answers are those of one rank each (P1)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import cluster
from tiny_llama import write_tokenizer
from tiny_models import make_model

import legato

PROMPTS = [[3 + (seed * 31 + 7 * index) % 90 for index in range(length)] for seed, length in enumerate((5, 37, 61, 18))]
TOKENS = 14
PAIRS = [
    ("llama3", {"layout": "dp2-stage"}, {"layout": "pp2"}),
    ("llama3.2-tied", {"block_tokens": "16"}, {"layout": "tp4"}),  # of 2 KV heads
    ("deepseek-v2-lite", {"layout": "tp2"}, {"layout": "pp2", "block_tokens": "5"}),  # latents
    ("mistral", {"layout": "pp2"}, {"block_tokens": "16"}),  # a sliding window
    ("mixtral", {"layout": "tp2"}, {"layout": "dp2-ep2"}),
    ("qwen3", {"layout": "tp2"}, {"layout": "dp2-stage", "block_tokens": "5"}),
]
OPTIONS = {"dtype": "float32", "max_step_tokens": "24", "max_sequences": "8", "block_tokens": "7", "threads": "1"}


@contextlib.contextmanager
def up(model: Path, folder: Path, prefill: dict[str, str], decode: dict[str, str]) -> Iterator[str]:
    """The address of a cluster of processes."""
    sections = {
        "ENGINE": {**OPTIONS, "kv_memory": "4MiB"},
        "PREFILL_ENGINE": prefill,
        "DECODE_ENGINE": decode,
        "HANDOFF": {"layer_group_bytes": "1"},  # every layer leaves by itself
    }
    variables = {
        f"LEGATO_{section}__{key.upper()}": value for section, keys in sections.items() for key, value in keys.items()
    }
    command = [sys.executable, "-m", "legato.command.main", "up", "--model", str(model), "--port", "0"]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--run-folder", str(folder / "run")],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=os.environ | variables,
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready grpc="), (folder / "stderr").read_text()
        yield line.removeprefix("ready grpc=").strip()
    finally:
        process.terminate()
        assert process.wait(30) == 0


async def answers(client: legato.AsyncClient) -> list[Any]:
    async def one(prompt: list[int]) -> Any:
        return await client.generate(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)

    found = await asyncio.gather(*(one(prompt) for prompt in PROMPTS))
    assert [each.route.attempts for each in found] == [1] * len(PROMPTS)
    moved = [each.route.transfer for each in found]
    assert [each.sent_tokens + each.skipped_tokens for each in moved] == [len(prompt) for prompt in PROMPTS]
    return [each.token_ids for each in found]


@pytest.mark.parametrize(("name", "prefill", "decode"), PAIRS)
async def test_prefill_and_decode_of_unlike_layouts(
    tmp_path: Path, redis_url: str, name: str, prefill: dict[str, str], decode: dict[str, str]
) -> None:
    model = make_model(tmp_path / "model", name)
    write_tokenizer(model, json.loads((model / "config.json").read_text())["vocab_size"])
    async with cluster(model, redis_url, engine={**OPTIONS, "num_blocks": None, "kv_memory": "4MiB"}) as one_rank:
        expected = await answers(one_rank.client)
    with up(model, tmp_path, prefill, decode) as address:
        async with legato.AsyncClient(address, timeout_s=120) as client:
            assert await answers(client) == expected
            assert await answers(client) == expected  # with what is in the prefix caches
            view = await client.cluster()
            assert [worker.refused_handoffs for worker in view.workers] == [0, 0]
