"""Routes between workers of any two layouts, their digests, and what peers are told of ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_worker import MemoryWorker, make_worker, model_layout, random_kv

from kvtransfer.copying import copy
from kvtransfer.digest import HeldDigest, SentDigests, counting
from kvtransfer.plan import RankKV, plan_transfer
from kvtransfer.routes import (
    HandoffPlan,
    RankMemory,
    layout_id,
    ranks_from_proto,
    ranks_to_proto,
    routes_between,
    whole_layout,
)
from kvtransfer.transport import Piece
from legato.v1 import worker_pb2
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration, InvalidParameter
from spec.hf_config import model_from_hf
from spec.layout import KVLayout, ParallelLayout
from spec.shard import shard_of


def move(source: MemoryWorker, target: MemoryWorker, pieces: Sequence[Piece]) -> None:
    for source_offset, target_offset, nbytes in pieces:
        target.region[target_offset : target_offset + nbytes] = source.region[source_offset : source_offset + nbytes]


def torch_views(worker: MemoryWorker, group: int) -> list[torch.Tensor]:
    return [
        torch.from_numpy(view) for rank, view in zip(worker.ranks, worker.views, strict=True) if rank.group == group
    ]


@st.composite
def handoffs(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    heads, planes = draw(st.sampled_from([(1, 1), (1, 2), (2, 2), (3, 2), (4, 2)]))  # one plane: latents
    dtype = draw(st.sampled_from([Dtype.FLOAT16, Dtype.INT8]))
    whole = model_layout(draw(st.integers(1, 5)), heads, 1, dtype, planes)
    first, count = draw(st.integers(0, 9)), draw(st.integers(1, 17))
    sides = []
    for _ in range(2):
        cuts = sorted(draw(st.sets(st.integers(1, whole.num_layers), max_size=2)) | {0, whole.num_layers})
        tps = [tp for tp in range(1, 9) if tp <= heads or tp % heads == 0]
        block_tokens, dp = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, 2))
        layout = dataclasses.replace(whole, block_tokens=block_tokens)
        needed = layout.blocks_for(first + count)
        num_blocks = needed + draw(st.integers(0, 2))
        worker = make_worker(
            layout,
            tp=draw(st.sampled_from(tps)),
            layers=[range(a, b) for a, b in itertools.pairwise(cuts)],
            dp=dp,
            num_blocks=num_blocks,
            seed=draw(st.integers(0, 99)),
        )
        blocks = list(range(needed)) if draw(st.booleans()) else draw(st.permutations(range(num_blocks)))[:needed]
        sides.append((worker, draw(st.integers(0, dp - 1)), blocks))
    return whole, sides[0], sides[1], first, count


@given(handoffs())
@settings(max_examples=300, deadline=None)
def test_both_sides_digest_the_same_per_target_rank(handoff) -> None:  # type: ignore[no-untyped-def]
    whole, (source, source_group, source_blocks), (target, target_group, target_blocks), first, count = handoff
    source.fill(random_kv(whole, first + count, seed=8), source_blocks, source_group)
    source_ranks, target_ranks = source.of_group(source_group), target.of_group(target_group)
    again = target.region.copy()
    given = source_ranks, source_blocks, target_ranks, target_blocks, first, count
    uncounted = HandoffPlan(*given)
    move(source, target, uncounted.of())
    routes = routes_between(tuple(r.kv for r in source_ranks), tuple(r.kv for r in target_ranks))
    cut, end = whole.num_layers // 2, whole.num_layers
    copying, sending, landed = SentDigests(routes), SentDigests(routes), []
    plans = [HandoffPlan(*given, digests.sums) for digests in (sending, copying)]
    for layers in (range(cut, end), range(cut)):
        counted = plans[0].of(layers)
        assert counted.nbytes == uncounted.of(layers).nbytes
        for call in counting(counted, source.region.ctypes.data):
            call()
        for grid in plans[1].of(layers).grids:
            for part in grid.cut(64, 200, 5):
                copy(part, source.region.ctypes.data, again.ctypes.data)
    assert (again == target.region).all(), "what is digested as it is copied is copied as it is without"
    for rank, view in zip(target_ranks, torch_views(target, target_group), strict=True):
        holding = HeldDigest(rank, view, target_blocks, first, count)
        for layers in (range(cut // 2, end), range(cut // 2)):
            for call in holding.counting(layers):
                call()
        landed.append(holding.digest())
    sent = sending.digests()
    assert sent == landed
    assert copying.digests() == landed
    by_content = {(rank.kv.layers, rank.kv.heads): digest for rank, digest in zip(target_ranks, landed, strict=True)}
    assert len(set(by_content.values())) == len(by_content), "ranks that hold other things have other digests"


def kvs(worker: MemoryWorker) -> tuple[RankKV, ...]:
    return tuple(rank.kv for rank in worker.ranks)


def test_equal_layouts_send_rank_to_rank_whole_blocks() -> None:
    for whole in (model_layout(), model_layout(heads=1, planes=1)):
        ours, theirs = (make_worker(whole, tp=4, layers=[range(2), range(2, 3)], seed=seed) for seed in (1, 2))
        routes = routes_between(kvs(ours), kvs(theirs))
        assert [(route.source, route.target) for route in routes] == [(rank, rank) for rank in range(8)]
        pieces = HandoffPlan(ours.ranks, [1, 4, 6], theirs.ranks, [5, 0, 3], 0, 12).of()
        assert len(pieces) == 8 * 3


def test_one_rank_each_is_what_the_two_ranks_alone_would_do() -> None:
    rank, other = RankKV.whole(model_layout()), RankKV.whole(model_layout(block_tokens=3))
    for pair in ((rank, rank), (rank, other)):
        tables = [4, 2, 7], [3, 1, 8, 0]
        expected = plan_transfer(pair[0], tables[0], pair[1], tables[1], 1, 9)
        found = HandoffPlan([RankMemory(pair[0])], tables[0], [RankMemory(pair[1])], tables[1], 1, 9).of()
        assert list(found) == list(expected)


def test_replicas_on_the_source_take_turns() -> None:
    latents = model_layout(num_layers=4, heads=1, planes=1)
    source = make_worker(latents, tp=4)
    target = make_worker(latents, tp=2, layers=[range(2), range(2, 4)])
    read = Counter(route.source for route in routes_between(kvs(source), kvs(target)))
    assert read == {0: 1, 1: 1, 2: 1, 3: 1}


def test_what_no_rank_here_holds_is_refused() -> None:
    whole = make_worker(model_layout())
    half = make_worker(model_layout(), layers=[range(2), range(2, 3)]).ranks[:1]
    with pytest.raises(InvalidConfiguration, match="hold 4 of 6"):
        HandoffPlan(half, [0], whole.ranks, [0], 0, 4)
    with pytest.raises(InvalidConfiguration, match="planes"):
        HandoffPlan(make_worker(model_layout(planes=1)).ranks, [0], whole.ranks, [0], 0, 4)


def test_the_layout_id_names_every_number_a_plan_depends_on() -> None:
    base = make_worker(model_layout(), tp=2).ranks
    layout = base[0].kv.layout

    def changed(**fields: object) -> tuple[RankMemory, ...]:
        return (dataclasses.replace(base[0], **fields), base[1])  # type: ignore[arg-type]

    others = [
        base[:1],
        base[::-1],
        changed(group=1),
        changed(offset_bytes=base[0].offset_bytes + 2),
        changed(kv=RankKV(layout, range(1, 4), range(1))),
        changed(kv=RankKV(layout, range(3), range(1, 2))),
        changed(kv=RankKV(dataclasses.replace(layout, block_tokens=8), range(3), range(1))),
        changed(kv=RankKV(dataclasses.replace(layout, dtype=Dtype.BFLOAT16), range(3), range(1))),
    ]
    assert len({layout_id(ranks) for ranks in [base, *others]}) == 1 + len(others)
    alone = RankMemory(RankKV.whole(layout))
    assert layout_id([alone]) == layout.layout_id


def test_ranks_travel_as_messages() -> None:
    worker = make_worker(model_layout(num_layers=5, heads=2), tp=4, layers=[range(2), range(2, 5)], dp=2)
    assert whole_layout(worker.ranks) == model_layout(num_layers=5, heads=2)
    assert ranks_from_proto(whole_layout(worker.ranks), ranks_to_proto(worker.ranks)) == worker.ranks


@pytest.mark.parametrize(
    "rank",
    [
        worker_pb2.RankKV(first_layer=0, num_layers=0, first_head=0, num_heads=2),
        worker_pb2.RankKV(first_layer=0, num_layers=3, first_head=0, num_heads=0),
        worker_pb2.RankKV(first_layer=1, num_layers=3, first_head=0, num_heads=2),
        worker_pb2.RankKV(first_layer=0, num_layers=3, first_head=1, num_heads=2),
    ],
)
def test_a_rank_that_cannot_be_is_refused(rank: worker_pb2.RankKV) -> None:
    whole: KVLayout = model_layout()
    with pytest.raises(InvalidParameter, match="ranks"):
        ranks_from_proto(whole, [rank])
    with pytest.raises(InvalidParameter, match="ranks are none"):
        ranks_from_proto(whole, [])


def test_kv_lies_alike_whoever_shares_the_mlp() -> None:
    """Blocks are a group's own either way: plans to and from other layouts are the same, bytes and digests too."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 96, "vocab_size": 131, "max_position_embeddings": 64}
    spec = model_from_hf({"model_type": "llama", "rms_norm_eps": 1e-5, **sizes})
    layouts = [ParallelLayout(tp=2, dp=2, pp=2), ParallelLayout(tp=2, dp=2, pp=2, mlp="stage")]
    found = []
    for layout in layouts:
        shards = [shard_of(spec, layout, rank) for rank in range(layout.num_ranks)]
        kv = [RankKV(each.kv_layout(spec, 4, Dtype.FLOAT16), each.layers, each.kv_heads) for each in shards]
        found.append(tuple(RankMemory(each, shard.group) for each, shard in zip(kv, shards, strict=True)))
    assert found[0] == found[1]
    assert layout_id(found[0]) == layout_id(found[1])
