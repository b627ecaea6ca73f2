"""KV that decode keeps in another dtype: converted once, into scratch that is given back."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import random
from collections.abc import Sequence

import numpy
import pytest
import torch
from handoff_cases import Case, draw_case
from memory_worker import loaded, make_worker, model_layout, slots

from engine.kv_memory import TORCH_DTYPES
from kernels.kv_rows import convert_rows, dequantise_rows, quantise_rows
from kvtransfer.memory import MemoryTransport
from kvtransfer.routes import HandoffPlan
from spec.dtype import Dtype
from worker.core import CoreRank
from worker.staging import SourceKV, Staging

# A float's rounding, relative to the value; where rows are quantised, relative to the row's largest: half of a code's
# step in int8 (127 steps), 2^-4 of the value in fp8 (three bits of mantissa).
ERROR = {
    Dtype.FLOAT32: 0.0,
    Dtype.BFLOAT16: 2**-8,
    Dtype.FLOAT16: 2**-11,
    Dtype.INT8: 0.51 / 127,
    Dtype.FLOAT8_E4M3: 2**-4,
}


def rows_of(values: torch.Tensor, dtype: Dtype) -> torch.Tensor:
    return quantise_rows(values, TORCH_DTYPES[dtype]) if dtype.is_quantised else values.to(TORCH_DTYPES[dtype])


def values_of(rows: torch.Tensor, dtype: Dtype) -> torch.Tensor:
    return (dequantise_rows(rows) if dtype.is_quantised else rows).double()


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(Dtype, 2)))
def test_rows_of_any_dtype_become_rows_of_any_other(source: Dtype, target: Dtype) -> None:
    given = rows_of(torch.randn(7, 3, 13, generator=torch.Generator().manual_seed(4)), source)
    values = values_of(given, source)
    found = convert_rows(given, TORCH_DTYPES[target])
    assert found.dtype is TORCH_DTYPES[target]
    assert found.shape[-1] == dataclasses.replace(model_layout(dtype=target), head_dim=13).row_elements
    error = (values_of(found, target) - values).abs() / values.abs().amax(-1, keepdim=True)
    assert error.max() <= ERROR[target]
    if ERROR[source] < ERROR[target]:
        assert error.max() > 0


async def staged_out(ranks: Sequence[CoreRank], block_ids: Sequence[int], layers: range) -> None:
    pass


async def test_scratch_holds_the_chunks_blocks_and_is_given_back() -> None:
    whole = model_layout(num_layers=3, heads=2, block_tokens=4, dtype=Dtype.FLOAT16)
    source = make_worker(whole, tp=2, num_blocks=9)
    values = numpy.random.default_rng(1).standard_normal((3, 2, 2, 33, 2)).astype(numpy.float16)
    blocks = [8, 1, 5, 0, 7, 2, 6, 3, 4]
    source.fill(values.view(numpy.uint8), blocks)
    target = make_worker(
        dataclasses.replace(whole, dtype=Dtype.FLOAT32, block_tokens=3), layers=[range(1), range(1, 3)], num_blocks=11
    )
    transport = MemoryTransport()
    region = transport.register(source.region.nbytes, memoryview(source.region))
    ranks = [
        CoreRank(rank.kv, offset_bytes=rank.offset_bytes, landing=torch.from_numpy(view).view(torch.float16))
        for rank, view in zip(source.ranks, source.views, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        staging = Staging(SourceKV(lambda group: ranks, region, transport.register, staged_out), target.ranks, pool)
        for first, end in ((0, 12), (12, 16), (16, 33)):  # grows, is used again, grows again
            chunk = await staging.stage(0, blocks, first, end, range(3))
            assert chunk.region is not region
            plan = HandoffPlan(chunk.ranks, chunk.block_table, target.ranks, range(11), first, end - first)
            scratch = numpy.frombuffer(chunk.region.buffer, numpy.uint8)
            for source_offset, target_offset, nbytes in plan.of():
                target.region[target_offset:][:nbytes] = scratch[source_offset : source_offset + nbytes]
            assert transport.counts()["regions"] == 2
            del scratch
        staging.release()
    assert transport.counts()["regions"] == 1
    for rank, view in zip(target.ranks, target.views, strict=True):
        found = numpy.stack([view[block, :, :, :, slot] for block, slot in slots(range(11), rank.kv.layout)], axis=3)
        expected = values[rank.kv.layers.start : rank.kv.layers.stop].astype(numpy.float32)
        numpy.testing.assert_array_equal(loaded(found, Dtype.FLOAT32), expected)
    transport.close()


async def test_whatever_the_layouts_every_converted_row_lands_where_it_belongs() -> None:
    """As tests/kvtransfer/test_plan_property.py does it for equal dtypes; here values, since rows are rounded."""
    transport = MemoryTransport()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        for seed in range(150):
            try:
                await check_converted(draw_case(seed, converting=True), transport, pool)
            except Exception as error:
                error.add_note(f"seed {seed}")
                raise
    assert transport.counts()["regions"] == 0
    transport.close()


async def check_converted(case: Case, transport: MemoryTransport, pool: concurrent.futures.Executor) -> None:
    source, target, whole = case.source, case.target, case.whole
    end = case.first_token + case.num_tokens
    shape = (whole.num_layers, whole.planes, whole.num_kv_heads, end, whole.head_dim)
    rows = rows_of(torch.randn(shape, generator=torch.Generator().manual_seed(6)), whole.dtype)
    values = values_of(rows, whole.dtype)
    source.worker.fill(rows.contiguous().view(torch.uint8).numpy(), source.blocks, source.group)
    region = transport.register(source.worker.region.nbytes, memoryview(source.worker.region))
    ranks = [
        CoreRank(rank.kv, rank.group, rank.offset_bytes, landing=as_rows(view, whole.dtype))
        for rank, view in zip(source.worker.ranks, source.worker.views, strict=True)
        if rank.group == source.group
    ]
    theirs = target.worker.of_group(target.group)
    staging = Staging(SourceKV(lambda group: ranks, region, transport.register, staged_out), theirs, pool)
    expected = target.worker.region.copy()
    cut = random.Random(case.num_tokens).randrange(whole.num_layers)
    for layers in (range(cut), range(cut, whole.num_layers)):  # those of one chunk follow each other into one scratch
        chunk = await staging.stage(source.group, source.blocks, case.first_token, end, layers)
        given = chunk.ranks, chunk.block_table, theirs, target.blocks, case.first_token, case.num_tokens
        scratch = numpy.frombuffer(chunk.region.buffer, numpy.uint8)
        for source_offset, target_offset, nbytes in HandoffPlan(*given).of(layers):
            target.worker.region[target_offset:][:nbytes] = scratch[source_offset : source_offset + nbytes]
    dtype = theirs[0].kv.layout.dtype
    for rank, view in zip(target.worker.ranks, target.worker.views, strict=True):
        if rank.group != target.group:
            continue
        layers, heads = rank.kv.layers, rank.kv.heads
        places = slots(target.blocks, rank.kv.layout)[case.first_token : end]
        found = as_rows(numpy.stack([view[block, :, :, :, slot] for block, slot in places], axis=3), dtype)
        sent = values[layers.start : layers.stop, :, heads.start : heads.stop, case.first_token :]
        error = (values_of(found, dtype) - sent).abs() / sent.abs().amax(-1, keepdim=True)
        assert error.max() <= ERROR[dtype]
        start, size = rank.offset_bytes, rank.kv.layout.block_bytes * target.num_blocks
        before = expected[start : start + size].reshape(view.shape)
        for block, slot in places:
            before[block, :, :, :, slot] = view[block, :, :, :, slot]
    numpy.testing.assert_array_equal(target.worker.region, expected, err_msg="more than the tokens was written")
    del scratch
    staging.release()
    region.release()


def as_rows(rows: numpy.ndarray, dtype: Dtype) -> torch.Tensor:
    """[..., row_bytes] of bytes as elements."""
    return torch.from_numpy(numpy.ascontiguousarray(rows)).view(TORCH_DTYPES[dtype])
