"""Norms of heads, rotation, and the write of keys and values: C++ and the reference, against NumPy in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from rope_inputs import CASES, NORMED, QUANTISED, Inputs, rows_at_the_ends, wide
from torch import Tensor

from kernels import rms_norm, rope_kv_write
from kernels.cpu.library import Library
from kernels.kv_rows import dequantise_rows, quantise_rows

ROUNDING = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def check(inputs: Inputs, queries: Tensor) -> None:
    case, dtype = inputs.case, inputs.qkv.dtype
    heads, terms = inputs.expected()
    queries_expected, keys_expected = np.split(heads, [case.num_heads], axis=1)
    keys, values = inputs.written()
    # A normed head is rounded before it turns; a key is rounded to the activations' dtype, then to the blocks'.
    normed = ROUNDING[dtype] * 1.01 if case.query_norm or case.key_norm else 0
    slack = terms * (2**-21 + normed)
    for got, expected, slack_of, rounding in (
        (queries, queries_expected, slack[:, : case.num_heads], ROUNDING[dtype]),
        (keys, keys_expected, slack[:, case.num_heads :], max(ROUNDING[dtype], ROUNDING[keys.dtype])),
    ):
        bound = (np.abs(expected) + slack_of) * rounding * 1.01 + slack_of + 1e-38
        assert (np.abs(wide(got) - expected) <= bound).all()
    assert queries.dtype == dtype
    assert torch.equal(keys, keys.to(dtype).to(keys.dtype)) or keys.dtype.itemsize < dtype.itemsize
    if values is not None:
        plain = inputs.qkv.view(inputs.rows, -1, case.head_dim)[:, case.num_heads + case.num_kv_heads :]
        assert torch.equal(values, plain.to(values.dtype))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=["kv_fp32", "kv_bf16"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("guarded", "one_thread")
def test_compiled(library: Library, dtype: torch.dtype, kv_dtype: torch.dtype, case: str) -> None:
    for rows in (1, 7, 123):
        inputs = Inputs(CASES[case], rows, dtype, kv_dtype)
        check(inputs, inputs.run(library.rope_kv_write))


@pytest.mark.parametrize("run", [rope_kv_write.reference, rope_kv_write.rope_kv_write])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_reference_and_what_a_cpu_runs(run: Callable[..., Tensor], dtype: torch.dtype, case: str) -> None:
    inputs = Inputs(CASES[case], 11, dtype, dtype)
    check(inputs, inputs.run(run))


@pytest.mark.parametrize("case", NORMED)
def test_a_head_is_rounded_between_its_norm_and_its_turn(library: Library, dtype: torch.dtype, case: str) -> None:
    """As Qwen3RMSNorm and Gemma3RMSNorm do: a norm of its own before, and the turn, give the same bits."""
    for norm, run in ((library.rms_norm, library.rope_kv_write), (rms_norm.reference, rope_kv_write.reference)):
        inputs = Inputs(CASES[case], 31, dtype, dtype)
        queries, (keys, _) = inputs.run(run), inputs.written()
        turned = inputs.run(run, inputs.normed_by(norm), rotary_offset=inputs.case.rotary_offset)
        assert torch.equal(turned, queries)
        assert torch.equal(inputs.written()[0], keys)


@pytest.mark.parametrize("kv_dtype", QUANTISED.values(), ids=QUANTISED)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("one_thread")
def test_row_quantised(library: Library, dtype: torch.dtype, kv_dtype: torch.dtype, case: str) -> None:
    """The bits of `quantise_rows` on the keys and values that blocks of the activations' dtype get."""
    for run in (library.rope_kv_write, rope_kv_write.reference, rope_kv_write.rope_kv_write):
        for rows in (1, 7, 123):
            exact, quantised = (Inputs(CASES[case], rows, dtype, stored) for stored in (dtype, kv_dtype))
            assert torch.equal(exact.run(run), quantised.run(run))
            for plain, row in zip(exact.written(), quantised.written(), strict=True):
                if plain is not None:
                    assert torch.equal(row.view(torch.uint8), quantise_rows(plain, kv_dtype).view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", QUANTISED.values(), ids=QUANTISED)
@pytest.mark.parametrize("head_dim", [1, 19, 64, 67])
@pytest.mark.usefixtures("one_thread")
def test_codes_at_the_ends(library: Library, dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> None:
    rows = rows_at_the_ends(120, head_dim).to(dtype)
    no_turn = torch.empty(1, 0)
    index = torch.arange(120)
    blocks = torch.zeros(24, 1, 5, head_dim + 4, dtype=torch.uint8).view(kv_dtype)
    library.rope_kv_write(rows, no_turn, no_turn, 0 * index, index, blocks, None, 0)
    found = blocks.view(120, head_dim + 4)
    assert torch.equal(found.view(torch.uint8), quantise_rows(rows, kv_dtype).view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", QUANTISED.values(), ids=QUANTISED)
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reads_so(library: Library, kv_dtype: torch.dtype, spoiled: float) -> None:
    rows = torch.ones(2, 40)
    rows[1, 3] = spoiled
    blocks = torch.zeros(2, 1, 1, 44, dtype=torch.uint8).view(kv_dtype)
    index, no_turn = torch.arange(2), torch.empty(1, 0)
    library.rope_kv_write(rows, no_turn, no_turn, 0 * index, index, blocks, None, 0)
    read = dequantise_rows(blocks)
    assert read[0].isfinite().all()
    assert not read[1].isfinite().any()


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, *QUANTISED.values()], ids=["bf16", *QUANTISED])
@pytest.mark.parametrize("case", ["llama", "latent", "gemma3"])
@pytest.mark.usefixtures("one_thread")
def test_a_row_has_the_same_bits_in_any_batch(
    library: Library, dtype: torch.dtype, kv_dtype: torch.dtype, case: str
) -> None:
    inputs = Inputs(CASES[case], 123, dtype, kv_dtype)
    queries, keys = None, None
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found = inputs.run(library.rope_kv_write)
        assert queries is None or torch.equal(found, queries)
        assert keys is None or torch.equal(inputs.written()[0].view(torch.uint8), keys)
        queries, keys = found, inputs.written()[0].view(torch.uint8)
    rows = inputs.positions, inputs.slots, inputs.qkv
    for i in range(0, 123, 17):
        inputs.positions, inputs.slots = rows[0][i : i + 1], rows[1][i : i + 1]
        assert torch.equal(inputs.run(library.rope_kv_write, rows[2][i : i + 1]), queries[i : i + 1])
    inputs.positions, inputs.slots, _ = rows
    assert torch.equal(inputs.written()[0].view(torch.uint8), keys)
