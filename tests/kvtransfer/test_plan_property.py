"""10,000 random hand-overs between any two workers: every target byte is written once and right, and nothing else.

Memories here hold a number for each byte. A byte of the sequence is numbered by what it is (layer, plane, head, token,
byte of the row), any other byte of the sender by 0, and a byte that was not written keeps its -1: content is told
exactly, where random bytes would be equal by chance. The oracle reads KVLayout's shape as NumPy does, and no offset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy
import pytest
from handoff_cases import Case, Side, draw_case
from numpy.typing import NDArray

from kvtransfer.plan import RankKV
from kvtransfer.routes import HandoffPlan, RankMemory
from kvtransfer.transport import Piece
from spec.dtype import Dtype

NUM_CASES = 10_000
CASES_OF_A_TEST = 1_000

Numbers = NDArray[numpy.int32]


def number(case: Case, side: Side, memory: Numbers, first_token: int, num_tokens: int) -> None:
    """Writes the numbers of these tokens to where each rank of the side's group keeps them."""
    whole, tokens = case.whole, numpy.arange(first_token, first_token + num_tokens)
    shape = (whole.num_layers, whole.planes, whole.num_kv_heads, case.first_token + case.num_tokens, whole.row_bytes)
    numbers = numpy.arange(1, 1 + numpy.prod(shape), dtype=numpy.int32).reshape(shape)
    for rank in side.worker.of_group(side.group):
        layers, heads = rank.kv.layers, rank.kv.heads
        blocks = numpy.array(side.blocks)[tokens // rank.kv.layout.block_tokens]
        theirs = numbers[layers.start : layers.stop, :, heads.start : heads.stop, first_token:][:, :, :, :num_tokens]
        held = _view(memory, rank, side.num_blocks)
        held[blocks, :, :, :, tokens % rank.kv.layout.block_tokens] = theirs.transpose(3, 0, 1, 2, 4)


def _view(memory: Numbers, rank: RankMemory, num_blocks: int) -> Numbers:
    layout = rank.kv.layout
    held = memory[rank.offset_bytes :][: num_blocks * layout.block_bytes]
    return held.reshape(*layout.shape(num_blocks)[:-1], layout.row_bytes)


def move(pieces: Sequence[Piece], source: Numbers, target: Numbers) -> NDArray[numpy.int64]:
    """How often each byte of the target was written."""
    sources, targets, sizes = numpy.array(list(pieces), dtype=numpy.int64).T
    assert sizes.min() > 0
    assert min(sources.min(), targets.min()) >= 0
    within = numpy.arange(sizes.sum()) - numpy.repeat(sizes.cumsum() - sizes, sizes)  # byte of its piece
    landing = numpy.repeat(targets, sizes) + within
    target[landing] = source[numpy.repeat(sources, sizes) + within]
    return numpy.bincount(landing, minlength=target.size)


def check(case: Case) -> None:
    source_memory = numpy.zeros(case.source.worker.region.size, dtype=numpy.int32)
    number(case, case.source, source_memory, 0, case.first_token + case.num_tokens)
    target_memory = numpy.full(case.target.worker.region.size, -1, dtype=numpy.int32)
    expected = target_memory.copy()
    number(case, case.target, expected, case.first_token, case.num_tokens)
    pieces = HandoffPlan(
        case.source.worker.of_group(case.source.group),
        case.source.blocks,
        case.target.worker.of_group(case.target.group),
        case.target.blocks,
        case.first_token,
        case.num_tokens,
    ).of()
    written = move(pieces, source_memory, target_memory)
    numpy.testing.assert_array_equal(target_memory, expected)
    numpy.testing.assert_array_equal(written, expected > 0, err_msg="written more than once")


@pytest.mark.parametrize("first_seed", range(0, NUM_CASES, CASES_OF_A_TEST))
def test_every_target_byte_is_written_once_and_right_and_nothing_else(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + CASES_OF_A_TEST):
        try:
            check(draw_case(seed))
        except Exception as error:
            error.add_note(f"seed {seed}: check(draw_case({seed}))")
            raise


def test_the_cases_are_of_every_kind() -> None:
    seen = set()
    for case in map(draw_case, range(300)):
        source, target = ([rank.kv for rank in side.worker.ranks] for side in (case.source, case.target))
        seen |= {case.whole.dtype, "latents" if case.whole.planes == 1 else "key and value"}
        seen |= {"prefix"} if case.first_token else set()
        end_token = case.first_token + case.num_tokens
        seen |= {"partial last block"} if end_token % target[0].layout.block_tokens else set()
        seen |= {"unlike blocks"} if source[0].layout.block_tokens != target[0].layout.block_tokens else set()
        seen |= {"other group"} if case.source.group != case.target.group else set()
        for name, kvs, others in (("source", source, target), ("target", target, source)):
            seen |= {f"{name} replicates heads"} if _replicates(kvs) and not _replicates(others) else set()
            seen |= {f"{name} has wider tp"} if _parts(kvs, "heads") > _parts(others, "heads") else set()
            seen |= {f"{name} has more stages"} if _parts(kvs, "layers") > _parts(others, "layers") else set()
    assert len(seen) == len(Dtype) + 2 + 4 + 6, seen


def _parts(kvs: Sequence[RankKV], of: str) -> int:
    return len({getattr(kv, of) for kv in kvs})


def _replicates(kvs: Sequence[RankKV]) -> bool:
    return len({kv.layers for kv in kvs}) * _parts(kvs, "heads") < len(kvs)
