"""Workers of several ranks, as processes, behind the real router: the text is that of one rank."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, cluster
from tiny_llama import load_reference, reference_of, write_tokenizer
from tiny_models import make_model

import legato
import worker.executor
from worker.meter import Meter

PROMPTS = [[random.Random(seed).randrange(3, 90) for _ in range(length)] for seed, length in enumerate((5, 37, 61, 18))]
TOKENS = 14


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {name: make_model(tmp_path_factory.mktemp(name), name) for name in ("llama3", "mixtral")}
    for folder in found.values():
        write_tokenizer(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    return found


async def answers(running: Cluster) -> list[Any]:
    async def one(prompt: list[int]) -> Any:
        return await running.client.generate(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True, logprobs=2)

    found = await asyncio.gather(*(one(prompt) for prompt in PROMPTS))
    return [(each.token_ids, each.finish_reason) for each in found]


@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama3", "tp2"), ("llama3", "pp2"), ("llama3", "dp2"), ("mixtral", "dp2-ep2"), ("llama3", "pp2-tp2")],
)
async def test_a_decode_worker_that_prefills_itself(
    models: dict[str, Path], redis_url: str, name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[tuple[float, float]] = []
    monkeypatch.setattr(worker.executor, "FIRST_REPLICATION_STEP", 4)
    monkeypatch.setattr(Meter, "experts_placed", lambda meter, *found: placed.append(found))
    options = {
        "max_step_tokens": 24,
        "max_sequences": 8,
        "block_tokens": 7,
        "num_blocks": None,
        "kv_memory": "4MiB",
    }
    async with cluster(models[name], redis_url, prefill=0, engine=options) as running:
        expected = await answers(running)
    options |= {"layout": layout, "expert_replicas": int("ep" in layout)}
    async with cluster(models[name], redis_url, prefill=0, engine=options) as running:
        assert await answers(running) == expected
        assert bool(placed) == ("ep" in layout)
        assert await answers(running) == expected  # with what is in the prefix caches
        await running.assert_as_at_start()


def greedy(model: Path, prompt: list[int]) -> tuple[int, ...]:
    """By transformers, in float32."""
    reference, tokens = load_reference(model), list(prompt)
    for _ in range(TOKENS):
        tokens.append(int(reference_of(reference, tokens)[-1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory as Linux alone does it")
def test_from_a_prefill_worker_of_two_ranks_to_a_decode_worker_of_two_stages(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """As processes: what one rank of the one side holds goes to several of the other."""
    model = models["llama3"]
    engine = {"dtype": "float32", "threads": 1, "block_tokens": 7, "max_step_tokens": 24, "max_sequences": 8}
    config = {
        "model": str(model),
        "engine": {**engine, "kv_memory": "4MiB"},
        "prefill_engine": {"layout": "tp2"},
        "decode_engine": {"layout": "pp2", "block_tokens": 5},
    }
    (tmp_path / "cluster.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "legato.command.main", "up", "--config", str(tmp_path / "cluster.yaml")]
    with (tmp_path / "stderr").open("w") as stderr:
        up = subprocess.Popen(
            [*command, "--port", "0", "--run-folder", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=stderr
        )
    try:
        assert up.stdout is not None
        line = up.stdout.readline().decode()
        assert line.startswith("ready grpc="), (tmp_path / "stderr").read_text()
        with legato.Client(line.removeprefix("ready grpc=").strip(), timeout_s=120) as client:
            for prompt in PROMPTS:
                found = client.generate(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
                assert found.token_ids == greedy(model, prompt)
                assert found.route is not None
                assert (found.route.attempts, found.route.transfer is not None) == (1, True)
    finally:
        up.terminate()
        assert up.wait(20) == 0
