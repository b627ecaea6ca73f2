"""A prefix that the decode worker holds is fetched from it, not computed again; whatever fails, the answer is right."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from breaking import break_once
from cluster import Cluster, cluster
from forced import check_forced
from tiny_llama import SHAPES, load_reference, make_llama

import worker.sender
from kvtransfer.digest import HeldDigest
from spec.errors import TransferFailed
from worker.meter import Meter
from worker.prefix_sends import PrefixSends

SHAPE = SHAPES[0]
DRAW = random.Random(12)
FIRST, SECOND, FORCED = (DRAW.choices(range(3, SHAPE.vocab_size), k=count) for count in (90, 20, 10))
TURN_TOKENS = 40  # of the first answer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPE)


@pytest.fixture(autouse=True)
def _computing_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a model that is worth fetching for."""
    monkeypatch.setattr(
        Meter, "seconds_per_token", property(lambda meter: 1.0, lambda meter, value: None), raising=False
    )


async def ask(running: Cluster, prompt: list[int], max_tokens: int = TURN_TOKENS) -> Any:
    return await running.client.generate(prompt, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


async def converse(running: Cluster) -> list[int]:
    """A first turn through prefill-0, which is gone for the second; the second turn's prompt."""
    first = await ask(running, FIRST)
    assert first.route.prefill_worker_id == "prefill-0"
    return [*FIRST, *first.token_ids, *SECOND]


def total(running: Cluster, worker_id: str, name: str) -> int:
    return running.workers[worker_id].core.all_totals()[name]


@pytest.mark.parametrize(
    ("prefill", "decode"),
    [({}, {}), ({"block_tokens": 24}, {"block_tokens": 7}), ({}, {"layout": "tp2"})],
    ids=["alike", "other blocks", "tp2"],
)
async def test_a_conversation_goes_on_with_what_decode_holds(
    model: Path, redis_url: str, prefill: dict[str, Any], decode: dict[str, Any]
) -> None:
    engine = {"max_step_tokens": 64, "max_sequences": 4}
    async with cluster(model, redis_url, engine=engine, prefill_engine=prefill, decode_engine=decode) as running:
        prompt = await converse(running)
        await running.assert_as_at_start()
        prefilled = total(running, "prefill-0", "computed_tokens")
        second = await ask(running, prompt, 4)
        size, target = prefill.get("block_tokens", 16), decode.get("block_tokens", 16)
        held = (len(FIRST) + TURN_TOKENS - 1) // target * target  # the answer's last token has no KV
        assert second.route.transfer.skipped_tokens == held
        assert second.route.prefill_cached_tokens == held // size * size
        assert total(running, "prefill-0", "computed_tokens") - prefilled == len(prompt) - held // size * size
        fetched = total(running, "prefill-0", "fetched_tokens")
        assert fetched == held // size * size - len(FIRST) // size * size
        await check_forced(running, load_reference(model), SHAPE.vocab_size, prompt, FORCED)
        await running.assert_as_at_start()


def _refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(sends: PrefixSends, request: Any) -> Any:
        raise TransferFailed("planted")

    monkeypatch.setattr(PrefixSends, "send", send)


def _break(monkeypatch: pytest.MonkeyPatch) -> None:
    async def finish(sender: Any, state: Any) -> Any:
        if state is None:
            raise TransferFailed("planted")
        return await real(sender, state)

    real = worker.sender.Sender.finish
    monkeypatch.setattr(worker.sender.Sender, "finish", finish)


def _flip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the prefix what lands is not what was sent."""

    def digest(held: HeldDigest) -> bytes:
        return bytes(16)

    async def send(sends: PrefixSends, request: Any) -> Any:
        with monkeypatch.context() as fetching:
            fetching.setattr(HeldDigest, "digest", digest)
            return await real(sends, request)

    real = PrefixSends.send
    monkeypatch.setattr(PrefixSends, "send", send)


@pytest.mark.parametrize("fault", [_refuse, _break, _flip])
async def test_what_cannot_be_fetched_is_computed(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    async with cluster(model, redis_url, prefill=0) as running:
        prompt = [*FIRST, *(await ask(running, FIRST)).token_ids, *SECOND]
        expected = (await ask(running, prompt, 8)).token_ids
    async with cluster(model, redis_url) as running:
        assert await converse(running) == prompt
        fault(monkeypatch)
        asked, send = [], PrefixSends.send

        async def counted(sends: PrefixSends, request: Any) -> Any:
            asked.append(request)
            return await send(sends, request)

        monkeypatch.setattr(PrefixSends, "send", counted)
        again = await ask(running, prompt, 8)
        assert again.token_ids == expected
        assert len(asked) == again.route.attempts == 1
        assert total(running, "prefill-0", "fetched_tokens") == 0
        assert running.workers["prefill-0"].core.meter.refused_handoffs == (fault is _flip)
        await running.assert_as_at_start()


async def test_a_resumed_prompt_is_fetched_by_who_goes_on(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first hand-over breaks after two chunks; the second prefill worker has what landed from the decode worker."""
    async with cluster(model, redis_url, prefill=0) as running:
        expected = (await ask(running, FIRST)).token_ids
    engine = {"max_step_tokens": 32, "max_sequences": 4}
    async with cluster(model, redis_url, prefill=2, engine=engine) as running:
        warm_up = await asyncio.gather(*(ask(running, DRAW.choices(range(3, 400), k=99)) for _ in range(4)))
        assert {each.route.prefill_worker_id for each in warm_up} == {"prefill-0", "prefill-1"}, "links are measured"
        break_once(monkeypatch, 2)
        answer = await ask(running, FIRST)
        assert answer.token_ids == expected
        assert answer.route.attempts == 2
        assert answer.route.transfer.skipped_tokens == 64
        assert answer.route.prefill_cached_tokens == 64
        assert total(running, answer.route.prefill_worker_id, "fetched_tokens") == 64
        await running.assert_as_at_start()
