"""Transfer plans against a NumPy oracle that moves one (token, layer, key/value, head) row at a time."""

from __future__ import annotations

import itertools

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer import grids
from kvtransfer.pieces import check_pieces
from kvtransfer.plan import RankKV, plan_transfer
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration, InvalidParameter
from spec.layout import KVLayout


def rank(layers: range, heads: range, block_tokens: int, head_dim: int = 3, dtype: Dtype = Dtype.FLOAT16) -> RankKV:
    return RankKV(KVLayout(len(layers), len(heads), head_dim, block_tokens, dtype), layers, heads)


def memory(owner: RankKV, num_blocks: int, seed: int | None) -> numpy.ndarray:
    """Random distinct-looking bytes, or 0xEE where nothing was written."""
    shape = owner.layout.shape(num_blocks)
    if seed is None:
        return numpy.full(shape, 0xEEEE, dtype=numpy.uint16)
    return numpy.random.default_rng(seed).integers(0, 0xEEEE, shape, dtype=numpy.uint16)


def oracle(source: RankKV, source_kv, source_blocks, target: RankKV, target_kv, target_blocks, first, count):  # type: ignore[no-untyped-def]
    expected = target_kv.copy()
    for token in range(first, first + count):
        from_block, from_slot = divmod(token, source.layout.block_tokens)
        to_block, to_slot = divmod(token, target.layout.block_tokens)
        for layer in set(source.layers) & set(target.layers):
            for head in set(source.heads) & set(target.heads):
                row = source_kv[
                    source_blocks[from_block], layer - source.layers.start, :, head - source.heads.start, from_slot
                ]
                expected[
                    target_blocks[to_block], layer - target.layers.start, :, head - target.heads.start, to_slot
                ] = row
    return expected


def subrange(draw: st.DrawFn, length: int) -> range:
    start = draw(st.integers(0, length - 1))
    return range(start, draw(st.integers(start + 1, length)))


@st.composite
def transfers(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    same = draw(st.booleans())
    layers, heads = subrange(draw, 4), subrange(draw, 4)
    source = rank(layers, heads, draw(st.sampled_from([1, 2, 3, 4, 8])))
    target = source if same else rank(subrange(draw, 4), subrange(draw, 4), draw(st.sampled_from([1, 2, 3, 4, 6, 8])))
    first, count = draw(st.integers(0, 20)), draw(st.integers(1, 40))
    tables = []
    for owner in (source, target):
        needed = owner.layout.blocks_for(first + count)
        pool = needed + draw(st.integers(0, 3))
        ordered = draw(st.booleans())
        tables.append(list(range(pool))[:needed] if ordered else draw(st.permutations(range(pool)))[:needed])
    return source, tables[0], target, tables[1], first, count


@given(transfers())
@settings(max_examples=300, deadline=None)
def test_every_byte_arrives_once_and_nothing_else_is_touched(transfer) -> None:  # type: ignore[no-untyped-def]
    source, source_blocks, target, target_blocks, first, count = transfer
    source_kv = memory(source, max(source_blocks) + 1, seed=1)
    target_kv = memory(target, max(target_blocks) + 1, seed=None)
    expected = oracle(source, source_kv, source_blocks, target, target_kv, target_blocks, first, count)
    pieces = plan_transfer(source, source_blocks, target, target_blocks, first, count)

    source_bytes, target_bytes = source_kv.view(numpy.uint8).reshape(-1), target_kv.view(numpy.uint8).reshape(-1)
    written = numpy.zeros(target_bytes.shape, dtype=numpy.int32)
    for source_offset, target_offset, nbytes in pieces:
        assert 0 <= source_offset <= source_bytes.size - nbytes
        assert 0 <= target_offset <= target_bytes.size - nbytes
        target_bytes[target_offset : target_offset + nbytes] = source_bytes[source_offset : source_offset + nbytes]
        written[target_offset : target_offset + nbytes] += 1
    assert written.max(initial=0) <= 1, "a byte is written twice"
    numpy.testing.assert_array_equal(target_kv, expected)
    common = len(set(source.layers) & set(target.layers)) * len(set(source.heads) & set(target.heads))
    assert written.sum() == common * 2 * source.layout.head_dim * 2 * count


@given(transfers())
@settings(max_examples=100, deadline=None)
def test_no_two_neighbours_of_whole_runs_could_be_one(transfer) -> None:  # type: ignore[no-untyped-def]
    pieces = plan_transfer(*transfer)
    whole_bytes = max(transfer[0].layout.run_bytes, transfer[2].layout.run_bytes)
    for before, after in itertools.pairwise(pieces):
        touches = (
            before.source_offset + before.nbytes == after.source_offset
            and before.target_offset + before.nbytes == after.target_offset
        )
        assert not touches or min(before.nbytes, after.nbytes) < whole_bytes


@given(transfers(), st.data())
@settings(max_examples=200, deadline=None)
def test_a_plan_reads_like_a_list(transfer, data: st.DataObject) -> None:  # type: ignore[no-untyped-def]
    """Whatever the size of the window in which it is expanded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grids, "WINDOW_PIECES", data.draw(st.integers(1, 9)))
        plan = plan_transfer(*transfer)
        pieces = list(plan)
        assert len(plan) == len(pieces)
        assert [plan[index] for index in range(len(plan))] == pieces
        assert [plan[index] for index in reversed(range(-len(plan), 0))] == pieces[::-1]
        start, stop = data.draw(st.integers(-9, 40)), data.draw(st.integers(-9, 40))
        assert plan[start:stop] == pieces[start:stop]
        assert plan[start:stop:2] == pieces[start:stop:2]
        assert plan[::-3] == pieces[::-3]
        with pytest.raises(IndexError):
            plan[len(plan)]


@given(transfers())
@settings(max_examples=200, deadline=None)
def test_a_plan_that_does_not_fit_is_refused_and_its_size_is_known(transfer) -> None:  # type: ignore[no-untyped-def]
    plan = plan_transfer(*transfer)
    pieces = list(plan)
    assert plan.nbytes == sum(piece.nbytes for piece in pieces)
    if not pieces:
        return
    source_bytes = max(piece.source_offset + piece.nbytes for piece in pieces)
    target_bytes = max(piece.target_offset + piece.nbytes for piece in pieces)
    assert check_pieces(plan, source_bytes, target_bytes) == check_pieces(pieces, source_bytes, target_bytes)
    with pytest.raises(InvalidParameter, match="read"):
        check_pieces(plan, source_bytes - 1, target_bytes)
    with pytest.raises(InvalidParameter, match="write"):
        check_pieces(plan, source_bytes, target_bytes - 1)


def test_a_long_prompt_between_unlike_layouts_is_planned_in_few_numbers() -> None:
    """Eight ranks, each one head of all layers, to the first of four stages: 2,621,440 pieces in all."""
    source = rank(range(80), range(1), 16, head_dim=128)
    target = rank(range(20), range(8), 16, head_dim=128)
    plan = plan_transfer(source, range(2048), target, range(2048), 0, 32768)
    assert len(plan) == 2048 * 20 * 2
    assert plan.nbytes == 32768 * 20 * 2 * 256
    numbers = sum(column.size for grid in plan.grids for column in grid[:6])
    assert numbers == 3 * (2048 + 40)


def test_whole_blocks_of_one_layout_are_one_piece_each_and_neighbours_merge() -> None:
    whole = RankKV.whole(KVLayout(30, 3, 64, 16, Dtype.BFLOAT16))
    size = whole.layout.block_bytes
    assert list(plan_transfer(whole, [7, 8, 2], whole, [1, 2, 9], 0, 48)) == [
        (7 * size, size, 2 * size),
        (2 * size, 9 * size, size),
    ]
    assert len(plan_transfer(whole, [4, 9, 1, 3], whole, [1, 5, 3, 8], 16, 48)) == 3
    scattered = plan_transfer(whole, list(range(0, 4096, 2)), whole, list(range(2048)), 0, 32768)
    assert len(scattered) == 2048


def test_a_partial_last_block_moves_only_its_tokens() -> None:
    whole = RankKV.whole(KVLayout(2, 2, 4, 8, Dtype.FLOAT32))
    pieces = plan_transfer(whole, [0, 1], whole, [3, 5], 0, 11)
    assert sum(piece.nbytes for piece in pieces) == 11 * whole.layout.token_bytes
    assert len(pieces) == 1 + 2 * 2 * 2


def test_ranks_without_a_common_layer_or_head_exchange_nothing() -> None:
    assert not plan_transfer(rank(range(2), range(2), 4), [0], rank(range(2, 4), range(2), 4), [0], 0, 4)
    assert not plan_transfer(rank(range(2), range(1), 4), [0], rank(range(2), range(1, 3), 4), [0], 0, 4)


def test_what_no_copy_converts_is_refused_by_name() -> None:
    half, full = rank(range(2), range(2), 4), rank(range(2), range(2), 4, dtype=Dtype.FLOAT32)
    with pytest.raises(InvalidConfiguration, match="dtype"):
        plan_transfer(half, [0], full, [0], 0, 4)
    with pytest.raises(InvalidConfiguration, match="head_dim"):
        plan_transfer(half, [0], rank(range(2), range(2), 4, head_dim=6), [0], 0, 4)
    with pytest.raises(InvalidConfiguration, match="do not fit"):
        RankKV(half.layout, range(3), range(2))


BAD = {
    "source too short": ([0], [0, 1], 0, 5),
    "target too short": ([0, 1], [0], 0, 5),
    "target twice": ([0, 1], [3, 3], 0, 8),
    "negative block": ([0, -1], [0, 1], 0, 8),
    "no tokens": ([0], [0], 0, 0),
    "negative token": ([0], [0], -1, 2),
}


@pytest.mark.parametrize(("source_blocks", "target_blocks", "first", "count"), list(BAD.values()), ids=list(BAD))
def test_a_bad_block_table_or_token_range_is_refused(source_blocks, target_blocks, first, count) -> None:  # type: ignore[no-untyped-def]
    whole = rank(range(1), range(1), 4)
    with pytest.raises(InvalidParameter):
        plan_transfer(whole, source_blocks, whole, target_blocks, first, count)
