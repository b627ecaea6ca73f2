"""KV that decode keeps in another dtype: converted once, into scratch that is given back."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Sequence

import numpy
import pytest
import torch
from memory_worker import loaded, make_worker, model_layout, slots

from engine.kv_memory import TORCH_DTYPES
from kernels.kv_rows import dequantise_rows, quantise_rows
from kvtransfer.memory import MemoryTransport
from kvtransfer.routes import plan_handoff
from spec.dtype import Dtype
from worker.core import CoreRank
from worker.staging import SourceKV, Staging, convert_rows

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


async def staged_out(ranks: Sequence[CoreRank], block_ids: Sequence[int]) -> None:
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
            chunk = await staging.stage(0, blocks, first, end)
            assert chunk.region is not region
            pieces = plan_handoff(chunk.ranks, chunk.block_table, target.ranks, range(11), first, end - first)
            scratch = numpy.frombuffer(chunk.region.buffer, numpy.uint8)
            for source_offset, target_offset, nbytes in pieces:
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
