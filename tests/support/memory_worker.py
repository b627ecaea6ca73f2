"""Workers of several ranks as memories alone: one region of bytes, the KV of each rank a slice of it."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory
from spec.dtype import Dtype
from spec.layout import KVLayout
from spec.shard import split

Bytes = NDArray[numpy.uint8]
GAP_BYTES = 64


@dataclasses.dataclass
class MemoryWorker:
    """`region` [bytes]; `views[r]` [num_blocks, layers, planes, heads, block_tokens, row_bytes], of it."""

    ranks: tuple[RankMemory, ...]
    region: Bytes
    views: list[Bytes]

    def of_group(self, group: int) -> list[RankMemory]:
        return [rank for rank in self.ranks if rank.group == group]

    def fill(self, kv: Bytes, blocks: Sequence[int], group: int = 0) -> None:
        """`kv` [layers, planes, heads, tokens, row_bytes], of the model: each rank of the group gets its share."""
        for rank, view in zip(self.ranks, self.views, strict=True):
            if rank.group == group:
                for token, (block, slot) in zip(range(kv.shape[3]), slots(blocks, rank.kv.layout), strict=False):
                    view[block, :, :, :, slot] = kv[_slice(rank.kv.layers), :, _slice(rank.kv.heads), token]


def slots(blocks: Sequence[int], layout: KVLayout) -> list[tuple[int, int]]:
    """(block, slot) of each token."""
    return list(itertools.product(blocks, range(layout.block_tokens)))


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)


def make_worker(
    whole: KVLayout,
    *,
    tp: int = 1,
    layers: Sequence[range] | None = None,
    dp: int = 1,
    num_blocks: int = 9,
    seed: int = 0,
) -> MemoryWorker:
    """`layers`: of each pipeline stage. Where tp exceeds the KV heads, each is on several ranks."""
    random_bytes = numpy.random.default_rng(seed)
    held = []
    for stage in layers or [range(whole.num_layers)]:
        for group, index in itertools.product(range(dp), range(tp)):
            heads = split(whole.num_kv_heads, tp, index)
            if tp > whole.num_kv_heads:
                head = index * whole.num_kv_heads // tp
                heads = range(head, head + 1)
            layout = dataclasses.replace(whole, num_layers=len(stage), num_kv_heads=len(heads))
            held.append((RankKV(layout, stage, heads), group))
    offsets, end = {}, 0
    for number in random.Random(seed).sample(range(len(held)), len(held)):  # in any order, with room between
        offsets[number] = end
        end += num_blocks * held[number][0].layout.block_bytes + GAP_BYTES
    region = random_bytes.integers(0, 256, end, dtype=numpy.uint8)
    ranks = tuple(RankMemory(kv, group, offsets[number]) for number, (kv, group) in enumerate(held))
    views = []
    for rank in ranks:
        layout = rank.kv.layout
        shape = (*layout.shape(num_blocks)[:-1], layout.row_bytes)
        views.append(region[rank.offset_bytes :][: num_blocks * layout.block_bytes].reshape(shape))
    return MemoryWorker(ranks, region, views)


def random_kv(whole: KVLayout, num_tokens: int, seed: int) -> Bytes:
    """[layers, planes, heads, tokens, row_bytes]"""
    shape = (whole.num_layers, whole.planes, whole.num_kv_heads, num_tokens, whole.row_bytes)
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype=numpy.uint8)


def model_layout(
    num_layers: int = 3, heads: int = 2, block_tokens: int = 4, dtype: Dtype = Dtype.FLOAT16, planes: int = 2
) -> KVLayout:
    return KVLayout(num_layers, heads, 2, block_tokens, dtype, planes)


NUMPY_DTYPES = {Dtype.FLOAT32: numpy.float32, Dtype.FLOAT16: numpy.float16}


def stored(values: NDArray[numpy.float32], dtype: Dtype) -> Bytes:
    """[..., head_dim] -> [..., row_bytes] as KVLayout says it: float32, float16 or int8."""
    if dtype is not Dtype.INT8:
        return values.astype(NUMPY_DTYPES[dtype]).view(numpy.uint8)
    scale = numpy.abs(values).max(-1, keepdims=True) / numpy.float32(127)
    codes = numpy.rint(values / numpy.where(scale == 0, numpy.float32(1), scale)).astype(numpy.int8)
    return numpy.concatenate([codes.view(numpy.uint8), scale.view(numpy.uint8)], axis=-1)


def loaded(rows: Bytes, dtype: Dtype) -> NDArray[numpy.float32]:
    """[..., row_bytes] -> [..., head_dim]"""
    if dtype is not Dtype.INT8:
        return numpy.ascontiguousarray(rows).view(NUMPY_DTYPES[dtype]).astype(numpy.float32)
    scale = numpy.ascontiguousarray(rows[..., -4:]).view(numpy.float32)
    return numpy.ascontiguousarray(rows[..., :-4]).view(numpy.int8).astype(numpy.float32) * scale
