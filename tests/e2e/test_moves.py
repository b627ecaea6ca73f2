"""A decode worker drains while it writes answers: its sequences move to another one, and no client sees more than a
pause. The oracle is the same request without a move, and a one-process answer under teacher forcing (P1)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cluster import KEY, Cluster, cluster
from forced import assert_same_distribution, rows_of
from rank_workers import Cut, answer, builder, toy_layout
from tiny_adapters import LLAMA_MODULES, write_adapter
from tiny_llama import SHAPES, load_reference, make_llama, reference_of

import router.moves
import worker.serving
from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel

TOKENS = 160
STEP_S = 0.004  # at least: a stream must outlive its move
PROMPT = [3 + 7 * index % 400 for index in range(50)]
REPEATING = [5, 6, 7, 8, 9] * 9
SCHEMA = json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 90})
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.9, "seed": 2, "top_k": 30, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0.8, "seed": 1, "repetition_penalty": 1.3, "presence_penalty": 0.4},
    "log-probabilities": {"temperature": 1.0, "seed": 3, "logit_bias": {7: 2.0, 9: -3.0}, "logprobs": 2},
    "stop strings": {"temperature": 1.0, "seed": 4, "stop": ["zzzz"], "frequency_penalty": 0.2},
    "prompt lookup": {"temperature": 0.0, "speculation": "prompt_lookup", "num_draft_tokens": 4, "ngram": 2},
    "constraint": {"temperature": 1.0, "seed": 6, "json_schema": SCHEMA},
    "adapter": {"temperature": 0.7, "seed": 7, "adapter": "poems"},
    "two answers": {"temperature": 0.7, "seed": 5, "n": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("moves")
    model = make_llama(folder / "model", SHAPES[0])
    return model, {"poems": str(write_adapter(folder / "poems", load_reference(model), LLAMA_MODULES, 5, 1))}


@contextlib.asynccontextmanager
async def slow_cluster(model: Path, redis_url: str, **options: Any) -> AsyncIterator[Cluster]:
    """Steps of the decode workers take their time, as those of a real model do."""
    async with cluster(model, redis_url, **options) as running:
        for name, worker in running.workers.items():
            if name.startswith("decode"):
                _slow_down(worker.core.executor)
        yield running


def _slow_down(executor: Any) -> None:
    submit = executor.submit

    def slow(*arguments: Any) -> None:
        time.sleep(STEP_S)
        submit(*arguments)

    executor.submit = slow


async def drain(running: Cluster, worker_id: str) -> float:
    """Seconds until the worker says that nothing runs there any more."""
    started_s = time.monotonic()
    async with channel(running.workers[worker_id].core.record.address, KEY) as link:
        await worker_pb2_grpc.WorkerStub(link).Drain(worker_pb2.DrainRequest(), timeout=60)
    return time.monotonic() - started_s


async def stream(running: Cluster, kind: str) -> Any:
    prompt = REPEATING if kind == "prompt lookup" else PROMPT
    return await running.client.generate(prompt, **_options(kind))


def _options(kind: str) -> dict[str, Any]:
    options = {"max_tokens": TOKENS, "ignore_eos": kind != "constraint", "timeout_s": 60.0, **KINDS[kind]}
    return options


def facts(answer: Any) -> Any:
    return [(choice.token_ids, choice.text, choice.finish_reason, choice.logprobs) for choice in answer.choices]


async def until_running(running: Cluster, worker_id: str, count: int) -> None:
    core = running.workers[worker_id].core
    before = core.scheduler.totals()["generated_tokens"]
    async with asyncio.timeout(30):
        while core.scheduler.load().running < count or core.scheduler.totals()["generated_tokens"] < before + 8 * count:
            await asyncio.sleep(0.002)


async def test_streams_of_every_kind_outlive_the_drain_of_their_worker(
    world: tuple[Path, dict[str, str]], redis_url: str
) -> None:
    model, adapters = world
    engine = {"adapters": adapters}
    async with slow_cluster(model, redis_url, decode=1, engine=engine) as running:
        undisturbed = [facts(await stream(running, kind)) for kind in KINDS]
    async with slow_cluster(model, redis_url, decode=2, engine=engine) as running:
        reads = [asyncio.create_task(stream(running, kind)) for kind in KINDS]
        await until_running(running, "decode-0", 1)
        await until_running(running, "decode-1", 1)
        drained_s = await drain(running, "decode-0")
        assert not all(read.done() for read in reads), "the drain ended before the last answer did"
        answers = await asyncio.gather(*reads)
        assert [facts(answer) for answer in answers] == undisturbed
        routes = [choice.route for answer in answers for choice in answer.choices]
        assert {route.attempts for route in routes} == {1}
        assert sum(route.moves for route in routes) >= 3
        assert {route.decode_worker_id for route in routes if route.moves} == {"decode-1"}
        assert drained_s < 5
        assert running.workers["decode-0"].core.meter.moved_sequences == sum(route.moves for route in routes)
        await running.assert_as_at_start()


async def test_the_distributions_behind_a_move_are_those_of_one_process(
    world: tuple[Path, dict[str, str]], redis_url: str
) -> None:
    """Promise P1: teacher-forced, against transformers."""
    model, vocab_size = world[0], SHAPES[0].vocab_size
    forced = [3 + 11 * index % 400 for index in range(60)]
    async with slow_cluster(model, redis_url, decode=2) as running:
        asked = asyncio.create_task(
            running.client.generate(
                PROMPT,
                forced_token_ids=forced,
                max_tokens=len(forced),
                ignore_eos=True,
                temperature=0.0,
                logprobs=vocab_size,
                timeout_s=60.0,
            )
        )
        await until_running(running, "decode-0", 1)
        await drain(running, "decode-0")
        found = await asked
        assert found.route.moves == 1
        await running.assert_as_at_start()
    expected = reference_of(load_reference(model), PROMPT + forced)[len(PROMPT) - 1 : -1]
    assert_same_distribution(rows_of(found.logprobs, vocab_size), expected)


HALVES = (range(2), range(2, 4))
WHOLE = toy_layout()
SMALLER = toy_layout(block_tokens=3)
LAYOUTS = {
    "tp2 to pp2": (Cut(WHOLE, tp=2), Cut(WHOLE, layers=HALVES)),
    "pp2 to tp4 of 2 KV heads, smaller blocks": (Cut(WHOLE, layers=HALVES), Cut(SMALLER, tp=4)),
    "dp groups": (Cut(SMALLER, tp=2, dp=2, group=1), Cut(WHOLE, layers=HALVES, dp=3, group=2)),
}


@pytest.mark.parametrize("pair", list(LAYOUTS))
async def test_between_unlike_layouts(
    world: tuple[Path, dict[str, str]], redis_url: str, monkeypatch: pytest.MonkeyPatch, pair: str
) -> None:
    """Each token depends on every byte of the KV before it, on all ranks."""
    first, second = LAYOUTS[pair]
    build = builder({"decode-0": first, "decode-1": second}, world[0])
    monkeypatch.setattr(worker.serving, "build_core", build)
    prompts = [[*PROMPT, 5], PROMPT[:17]]
    async with slow_cluster(world[0], redis_url, prefill=0, decode=2) as running:
        reads = [
            asyncio.create_task(running.client.generate(each, max_tokens=90, ignore_eos=True, temperature=0.0))
            for each in prompts
        ]
        await until_running(running, "decode-0", 1)
        await drain(running, "decode-0")
        answers = await asyncio.gather(*reads)
        assert [each.token_ids for each in answers] == [answer(each, 90, WHOLE) for each in prompts]
        assert sum(each.route.moves for each in answers) >= 1
        assert {each.route.attempts for each in answers} == {1}
        await running.assert_as_at_start()


async def test_a_worker_that_runs_out_of_blocks_gives_sequences_to_one_that_has_plenty(
    world: tuple[Path, dict[str, str]], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers grow together on one worker, while the other has ended what it had."""
    monkeypatch.setattr(router.moves, "LOOK_S", 0.1)
    growing = [[3 + index, *PROMPT[:29]] for index in range(6)]
    options = {"max_tokens": 120, "ignore_eos": True, "temperature": 0.8, "repetition_penalty": 1.2}
    engine = {"num_blocks": 32}
    async with cluster(world[0], redis_url, prefill=0) as running:
        undisturbed = [(await running.client.generate(p, seed=1, **options)).token_ids for p in growing]
    async with slow_cluster(world[0], redis_url, prefill=0, decode=2, engine=engine) as running:
        generate = running.client.generate
        first = asyncio.create_task(generate(growing[0], seed=1, **options))
        await until_running(running, "decode-0", 1)
        large = asyncio.create_task(generate(PROMPT * 6, max_tokens=30, ignore_eos=True))
        await until_running(running, "decode-1", 1)
        others = [asyncio.create_task(generate(each, seed=1, **options)) for each in growing[1:]]
        answers = await asyncio.gather(first, *others)
        await large
        assert [each.token_ids for each in answers] == undisturbed
        assert {each.route.attempts for each in answers} == {1}
        moves = [each.route.moves for each in answers]
        assert sum(moves) >= 1 and max(moves) == 1, f"{moves}: nobody comes back"
        assert running.workers["decode-1"].core.scheduler.totals()["preemptions"] == 0
        await running.assert_as_at_start()
