"""Promise P1 and P5 between workers of unlike layouts: the KV of every rank is right, or the hand-over is refused."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, cluster
from rank_workers import Cut, MemoryCore, answer, builder, toy_layout
from tiny_llama import SHAPES, make_llama

import worker.serving
from kvtransfer.grids import Grid, TransferPlan
from kvtransfer.routes import HandoffPlan
from kvtransfer.transport import Piece
from spec.dtype import Dtype

PROMPT = [random.Random(3).randrange(3, 400) for _ in range(75)]
TOKENS = 10
HALVES = (range(2), range(2, 4))
WHOLE = toy_layout()
LATENTS = toy_layout(heads=1, planes=1)
FOUR_HEADS = toy_layout(heads=4)
INT8 = toy_layout(dtype=Dtype.INT8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


def with_blocks(cut: Cut, block_tokens: int) -> Cut:
    return dataclasses.replace(cut, whole=dataclasses.replace(cut.whole, block_tokens=block_tokens))


PAIRS = {
    "tp2 to pp2": (Cut(WHOLE, tp=2), Cut(WHOLE, layers=HALVES)),
    "pp2 to tp2": (Cut(WHOLE, layers=(range(3), range(3, 4))), Cut(WHOLE, tp=2)),
    "tp4 to tp1": (Cut(FOUR_HEADS, tp=4), Cut(FOUR_HEADS)),
    "tp1 to tp4 of 2 KV heads": (Cut(WHOLE), Cut(WHOLE, tp=4)),
    "tp4 of 2 KV heads to pp2": (Cut(WHOLE, tp=4), Cut(WHOLE, layers=HALVES)),
    "latents, tp2 to pp2": (Cut(LATENTS, tp=2), Cut(LATENTS, layers=HALVES)),
    "latents, pp2 to tp4": (Cut(LATENTS, layers=HALVES), Cut(LATENTS, tp=4)),
    "equal, pp2-tp2": (Cut(WHOLE, tp=2, layers=HALVES), Cut(WHOLE, tp=2, layers=HALVES)),
    "smaller blocks": (Cut(WHOLE, tp=2), with_blocks(Cut(WHOLE, layers=HALVES), 3)),
    "larger blocks": (with_blocks(Cut(WHOLE, layers=HALVES), 5), Cut(WHOLE, tp=2)),
    "int8 at decode, tp2 to pp2": (Cut(WHOLE, tp=2), Cut(INT8, layers=HALVES)),
    "int8 at prefill, smaller blocks": (Cut(INT8), with_blocks(Cut(WHOLE, tp=4), 3)),
    "float32 latents at decode": (Cut(LATENTS, tp=2), Cut(toy_layout(heads=1, planes=1, dtype=Dtype.FLOAT32), tp=3)),
    "dp groups": (Cut(WHOLE, tp=2, dp=2, group=1), Cut(WHOLE, layers=HALVES, dp=3, group=2)),
}


async def greedy(running: Cluster, prompt: list[int]) -> Any:
    return await running.client.generate(prompt, max_tokens=TOKENS, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("pair", list(PAIRS))
async def test_the_kv_of_every_rank_arrives(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, pair: str
) -> None:
    prefill, decode = PAIRS[pair]
    monkeypatch.setattr(worker.serving, "build_core", builder({"prefill": prefill, "decode": decode}, model))
    expected = answer(PROMPT, TOKENS, prefill.whole, decode.whole)
    async with cluster(model, redis_url) as running:
        first = await greedy(running, PROMPT)
        assert first.token_ids == expected
        assert first.route.attempts == 1
        longer = [*PROMPT, *range(7, 30)]  # decode holds the prefix: only what is behind it is sent
        again = await greedy(running, longer)
        assert again.token_ids == answer(longer, TOKENS, prefill.whole, decode.whole)
        assert again.route.attempts == 1
        core = running.workers["decode-0"].core
        assert core.reservations.totals()["admitted"] == 2
        assert core.meter.refused_handoffs == 0
        await running.assert_as_at_start()


def decode_core(running: Cluster) -> MemoryCore:
    core = running.workers["decode-0"].core
    assert isinstance(core, MemoryCore)
    return core


class Faulty(list[Piece]):
    """Other pieces than those whose rows are digested."""

    grids: list[Grid]


@pytest.mark.parametrize("fault", ["a flipped bit", "a stale block"])
@pytest.mark.parametrize("pair", ["tp2 to pp2", "tp1 to tp4 of 2 KV heads", "latents, pp2 to tp4"])
async def test_one_rank_with_other_bytes_is_enough_to_refuse(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, pair: str, fault: str
) -> None:
    """On the last rank of the target alone, replica or not."""
    prefill, decode = PAIRS[pair]
    monkeypatch.setattr(worker.serving, "build_core", builder({"prefill": prefill, "decode": decode}, model))
    plan, faults = HandoffPlan.of, 0

    def faulty(whole: HandoffPlan, layers: range | None = None, target_host: int = 0) -> TransferPlan | Faulty:
        nonlocal faults
        faults += 1
        planned = plan(whole, layers, target_host)
        if faults > 1:
            return planned
        core = decode_core(running)
        rank, view = core.ranks[-1], core.memory.views[-1]
        start, stop = rank.offset_bytes, rank.offset_bytes + view.nbytes
        pieces = list(planned)
        there = [piece for piece in pieces if start <= piece.target_offset < stop]
        assert there
        missing = there[0] if fault == "a stale block" else there[-1]
        moved = Faulty(piece for piece in pieces if piece is not missing)
        moved.grids = planned.grids
        if fault != "a stale block":
            source, target, nbytes = missing
            moved += [Piece(source, target, nbytes - 1), Piece(source + nbytes, target + nbytes - 1, 1)]
        return moved

    async with cluster(model, redis_url) as running:
        monkeypatch.setattr(HandoffPlan, "of", faulty)
        found = await greedy(running, PROMPT)
        assert found.token_ids == answer(PROMPT, TOKENS, prefill.whole)
        assert found.route.attempts == 2
        assert decode_core(running).meter.refused_handoffs == 1
        await running.assert_as_at_start()
