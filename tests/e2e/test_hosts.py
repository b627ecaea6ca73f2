"""Workers whose ranks are on several hosts: each has the KV memory of its own ranks, and peers write to each of them.

Rank 0 says of itself here that it is on another host than the others: they share no memory with it, and have transports
of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import KEY, Cluster, cluster, two_free_ports
from tiny_llama import load_reference, reference_of, write_tokenizer
from tiny_models import make_model

import worker.build
from service.config import EngineConfig, WorkerConfig, save
from spec.errors import InvalidConfiguration
from worker.departures import Departures, Way
from worker.kv_region import map_file
from worker.landing import LandingCheck

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="ranks share memory as Linux alone does it")

PROMPTS = [[3 + (seed * 31 + 7 * index) % 90 for index in range(length)] for seed, length in enumerate((5, 37, 61, 18))]
OPTIONS = {"num_blocks": None, "kv_memory": "4MiB", "max_step_tokens": 24, "max_sequences": 8, "block_tokens": 7}
EVERY_LAYER = {"layer_group_bytes": 1}
TOKENS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("llama3"), "llama3")
    write_tokenizer(folder, json.loads((folder / "config.json").read_text())["vocab_size"])
    return folder


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.build, "host_name", lambda: "another")


@pytest.fixture(scope="module")
def expected(model: Path) -> list[tuple[int, ...]]:
    """By transformers, in float32."""
    reference, found = load_reference(model), []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(TOKENS):
            tokens.append(int(reference_of(reference, tokens)[-1].argmax()))
        found.append(tuple(tokens[len(prompt) :]))
    return found


async def answers(running: Cluster) -> list[Any]:
    async def one(prompt: list[int]) -> Any:
        return await running.client.generate(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)

    return list(await asyncio.gather(*(one(prompt) for prompt in PROMPTS)))


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
async def test_kv_lands_on_each_host(
    model: Path, redis_url: str, apart: None, expected: list[tuple[int, ...]], layout: str
) -> None:
    decode = {"layout": layout, "block_tokens": 5}
    async with cluster(model, redis_url, engine=OPTIONS, decode_engine=decode, handoff=EVERY_LAYER) as running:
        record = running.workers["decode-0"].core.record
        assert [rank.host for rank in record.ranks] == [0, 1]
        for _ in range(2):  # then with what is in the prefix caches
            found = await answers(running)
            assert [each.token_ids for each in found] == expected
            assert [each.route.attempts for each in found] == [1] * len(PROMPTS)
            moved = [each.route.transfer for each in found]
            assert [each.sent_tokens + each.skipped_tokens for each in moved] == [len(prompt) for prompt in PROMPTS]
        links = running.workers["prefill-0"].pool.links()
        assert {link.host for link in links if link.taken} == {0, 1}
        await running.assert_as_at_start()


async def test_a_byte_that_flipped_on_the_other_host(
    model: Path, redis_url: str, apart: None, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, flips = LandingCheck.take, 0

    async def flip_first(check: LandingCheck, end_layer: int) -> None:
        nonlocal flips
        if flips == 0:
            flips += 1
            memory, rank = map_file(others.kept[1].memory_path), check.ranks[1]
            assert rank.host == 1
            memory[rank.offset_bytes + check.block_ids[1] * rank.kv.layout.block_bytes] ^= 1
        await take(check, end_layer)

    async with cluster(model, redis_url, engine=OPTIONS, decode_engine={"layout": "tp2"}) as running:
        core = running.workers["decode-0"].core
        assert core.others is not None
        others = core.others
        monkeypatch.setattr(LandingCheck, "take", flip_first)
        found = await running.client.generate(PROMPTS[2], max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        assert flips == 1
        assert (found.token_ids, found.route.attempts) == (expected[2], 2)
        assert core.meter.refused_handoffs == 1
        await running.assert_as_at_start()


@pytest.mark.parametrize(
    ("role", "tiers", "word"),
    [
        ("prefill", {}, "role prefill"),
        ("decode", {"host_bytes": "1MiB"}, "kv_tiers.host_bytes"),
    ],
)
async def test_what_needs_all_kv_on_one_host_is_refused_by_name(
    model: Path, redis_url: str, apart: None, role: str, tiers: dict[str, str], word: str
) -> None:
    others = {"prefill": 0, "decode": 0} | {role: 1}
    with pytest.raises(InvalidConfiguration, match=f"2 hosts.*{word}"):
        async with cluster(model, redis_url, engine=OPTIONS | {"layout": "tp2"}, kv_tiers=tiers, **others):
            pass


def in_another_namespace(*command: str) -> list[str]:
    """It sees no process here, and shares no memory with one, as of another host."""
    return ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *command]


def cannot_be_apart() -> str:
    try:
        subprocess.run(in_another_namespace("true"), check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"process namespaces cannot be made (run as root): {error}"
    return ""


CANNOT_BE_APART = cannot_be_apart()


class Launched:
    """A decode worker of two ranks, each started by itself on a host of its own, as torchrun does."""

    def __init__(self, folder: Path, model: Path, redis_url: str, layout: str) -> None:
        options = {key: value for key, value in OPTIONS.items() if key != "num_blocks"}
        engine = EngineConfig(model=str(model), dtype="float32", device="cpu", threads=1, layout=layout, **options)
        shared = {"redis_url": redis_url, "cluster": "test", "cluster_key": KEY}
        save(WorkerConfig(role="decode", worker_id="decode-0", engine=engine, **shared), folder / "config.yaml")
        self.log = folder / "log"
        port = str(two_free_ports())
        command = [sys.executable, "-m", "decode_svc", "--config", str(folder / "config.yaml")]
        self.ranks = []
        for rank, started in enumerate((command, in_another_namespace(*command))):
            launch = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
            with self.log.open("a") as log:
                environment = os.environ | launch | {"LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port}
                process = subprocess.Popen(started, stderr=log, stdin=subprocess.DEVNULL, env=environment)
            self.ranks.append(process)

    async def ready(self) -> None:
        async with asyncio.timeout(120):
            while "state=ready" not in self.log.read_text():
                assert self.ranks[0].poll() is None, self.log.read_text()
                await asyncio.sleep(0.02)

    async def ended(self) -> list[int]:
        async with asyncio.timeout(25):
            return [await asyncio.to_thread(rank.wait) for rank in self.ranks]

    def kill_all(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@pytest.mark.skipif(bool(CANNOT_BE_APART), reason=CANNOT_BE_APART)
async def test_a_rank_of_the_other_host_is_killed_while_kv_moves_there(
    tmp_path: Path, model: Path, redis_url: str, expected: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode worker is lost as a whole, and the prefill worker has nothing left of it."""
    post, killed = Departures._post_pieces, list[int]()

    def post_to_the_dead(departures: Departures, chunk: Any, way: Way, *given: Any) -> None:
        if way.host == 1 and not killed:
            killed.append(first.ranks[1].pid)
            first.ranks[1].kill()
            first.ranks[1].wait()
        post(departures, chunk, way, *given)

    first = Launched(tmp_path, model, redis_url, "tp2")
    try:
        await first.ready()
        async with cluster(model, redis_url, decode=0, engine=OPTIONS) as running:
            assert [each.token_ids for each in await answers(running)] == expected
            monkeypatch.setattr(Departures, "_post_pieces", post_to_the_dead)
            asking = asyncio.create_task(running.client.generate([*PROMPTS[2], 7], max_tokens=TOKENS, timeout_s=90))
            assert await first.ended() == [1, -signal.SIGKILL]
            assert "legato: WORKER_LOST: rank 1 (pid " in first.log.read_text()
            assert "on another host) is gone" in first.log.read_text()
            asking.cancel()
            await asyncio.wait([asking])
            await running.assert_as_at_start()
    finally:
        first.kill_all()
    assert killed
