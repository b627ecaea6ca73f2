"""The product of some rows with a quantised weight (kernels/quantised.py), where no CPU library has packed it.

    out[t, n] = Σ_k x[t, k] · value[n, k] + bias[n]

On a GPU few rows, as decode has them, read the codes and expand them in registers: numbers are exact in bf16 and fp16,
and a group's products are summed and then scaled in fp32. Many rows multiply with slices of the weight in their own
dtype, by the vendor's GEMM, unless it is the sums in fp32 that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tuning
from kernels.jit import jit, tl, triton
from kernels.quantised import NUMBERS, QuantisedWeight, dequantise

SLICE_OUTPUTS = 8192  # of the weight that lie expanded at a time
FEW_ROWS = 64
ONE_GROUP = 1 << 30  # more than any K


def reference(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """In float32, rounded once."""
    out = torch.cat([F.linear(x.float(), values) for values in _slices(weight)], dim=1)
    out = out if bias is None else out + bias.float()
    return out if wide else out.to(x.dtype)


def _slices(weight: QuantisedWeight) -> Iterator[Tensor]:
    for first in range(0, weight.n, SLICE_OUTPUTS):
        yield dequantise(weight[first : first + SLICE_OUTPUTS])


@jit
def _e4m3(codes):
    """Exponent and fraction are placed as fp16's, 8 too low. A NaN stays one."""
    codes = codes.to(tl.int32)
    bits = (codes & 0x7F) << 7 | (codes & 0x80) << 8
    value = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((codes & 0x7F) == 0x7F, float("nan"), value)


@jit
def _number(codes, KIND: tl.constexpr):
    """fp32 numbers of codes in [0, 256), or [0, 16) for four bits."""
    if KIND == "int8":
        return codes.to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == "fp8":
        return _e4m3(codes)
    elif KIND == "int4":
        return codes.to(tl.float32) - 8.0
    else:  # E2M1, placed as fp16's, 14 too low
        codes = codes.to(tl.int32)
        bits = (codes & 7) << 9 | (codes & 8) << 12
        return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@jit
def _factor(ptr, mask, KIND: tl.constexpr):
    """fp32 scales or offsets; those of eight bits come as uint8."""
    loaded = tl.load(ptr, mask, other=0)
    if KIND == "e4m3":
        return _e4m3(loaded)
    elif KIND == "e8m0":
        bits = tl.where(loaded == 0, 0x00400000, loaded.to(tl.int32) << 23)
        return tl.where(loaded == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    else:
        return loaded.to(tl.float32)


@jit
def expanded_sums(
    x_row_ptr,  # [TILE_ROWS, 1], of rows of K
    in_rows,  # [TILE_ROWS]
    codes_ptr,  # [N, WIDTH] uint8, contiguous
    scales_ptr,  # [N, num_groups], contiguous
    offsets_ptr,  # [N, num_groups], contiguous; not read unless HAS_OFFSETS
    column,  # [TILE_N], of the N outputs
    N,
    K,
    WIDTH,
    num_groups,
    group,
    KIND: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    PER_CODE: tl.constexpr,  # a step has several groups: numbers are scaled before the product
    PER_BYTE: tl.constexpr,  # codes in a byte
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    STEP: tl.constexpr,  # bytes of an output; of one group unless PER_CODE
):
    """[TILE_ROWS, TILE_N] fp32, without output scales."""
    in_n = column < N
    place = tl.arange(0, STEP)
    code_ptr = codes_ptr + column.to(tl.int64)[None, :] * WIDTH + place[:, None]
    factor = column.to(tl.int64) * num_groups
    sums = tl.zeros((TILE_ROWS, TILE_N), tl.float32)
    for first in range(0, WIDTH, STEP):
        codes = tl.load(code_ptr + first, (first + place < WIDTH)[:, None] & in_n[None, :], other=0)
        of_group = tl.zeros((TILE_ROWS, TILE_N), tl.float32)
        of_x = tl.zeros((TILE_ROWS,), tl.float32)
        for half in tl.static_range(PER_BYTE):
            k = (first + place) * PER_BYTE + half
            x = tl.load(x_row_ptr + k[None, :], in_rows[:, None] & (k < K)[None, :], other=0.0)
            weights = _number(codes if PER_BYTE == 1 else (codes >> (4 * half)) & 15, KIND)
            if PER_CODE:
                index = factor[None, :] + (k // group)[:, None]
                inside = (k < K)[:, None] & in_n[None, :]
                weights *= _factor(scales_ptr + index, inside, SCALES)
                if HAS_OFFSETS:
                    weights += _factor(offsets_ptr + index, inside, "float")
            elif HAS_OFFSETS:
                of_x += tl.sum(x.to(tl.float32), axis=1)
            of_group = tl.dot(x, weights.to(x.dtype), of_group, input_precision="ieee")
        if PER_CODE:
            sums += of_group
        else:
            index = factor + first * PER_BYTE // group
            sums += of_group * _factor(scales_ptr + index, in_n, SCALES)[None, :]
            if HAS_OFFSETS:
                sums += of_x[:, None] * _factor(offsets_ptr + index, in_n, "float")[None, :]
    return sums


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_rows"])
def _kernel(
    x_ptr,  # [T, K], contiguous
    codes_ptr,
    scales_ptr,
    offsets_ptr,
    output_scales_ptr,  # [N] fp32; not read unless HAS_OUTPUT_SCALES
    bias_ptr,  # [N]; not read unless HAS_BIAS
    out_ptr,  # [T, N], contiguous, written
    num_rows,
    N,
    K,
    WIDTH,
    num_groups,
    group,
    KIND: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_OUTPUT_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PER_CODE: tl.constexpr,
    PER_BYTE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program per TILE_ROWS rows and TILE_N outputs."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    in_rows, in_n = row < num_rows, column < N
    sums = expanded_sums(
        x_ptr + row.to(tl.int64)[:, None] * K,
        in_rows,
        codes_ptr,
        scales_ptr,
        offsets_ptr,
        column,
        N,
        K,
        WIDTH,
        num_groups,
        group,
        KIND,
        SCALES,
        HAS_OFFSETS,
        PER_CODE,
        PER_BYTE,
        TILE_ROWS,
        TILE_N,
        STEP,
    )
    if HAS_OUTPUT_SCALES:
        sums *= tl.load(output_scales_ptr + column, in_n, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, in_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), in_rows[:, None] & in_n[None, :])


class Expansion(NamedTuple):
    """How a kernel goes through a weight: the last arguments of expanded_sums, but for the tiles."""

    per_code: bool
    per_byte: int
    step: int


def expansion(weight: QuantisedWeight, tile_k: int) -> Expansion:
    """tile_k: inputs of a step, where groups do not want fewer."""
    per_byte = 2 if weight.kind in NUMBERS else 1
    # The product wants 16 steps of depth at least, of one group if they can be.
    step = min(tile_k, weight.group & -weight.group if weight.group < weight.k else tile_k) // per_byte
    return Expansion(step < 16, per_byte, 32 if step < 16 else step)


def form_of(scales: Tensor) -> str:
    """As `_factor` is told."""
    return {torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}.get(scales.dtype, "float")


def launch(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    num_rows, k = x.shape
    out = x.new_empty(num_rows, weight.n, dtype=torch.float32 if wide else x.dtype)
    if num_rows == 0:
        return out
    codes, scales, offsets, output_scales = (None if t is None else t.contiguous() for t in weight.tensors())
    assert codes is not None
    assert scales is not None
    config = tuning.choose("quantised_linear", x.device, num_rows=num_rows, element_bytes=x.element_size())
    tile_rows, tile_n, tile_k = (config.tiles[name] for name in ("rows", "outputs", "depth"))
    per_code, per_byte, step = expansion(weight, tile_k)
    _kernel[(triton.cdiv(num_rows, tile_rows), triton.cdiv(weight.n, tile_n))](
        x.contiguous(),
        codes.view(torch.uint8),
        scales.view(torch.uint8) if scales.element_size() == 1 else scales,
        offsets,
        output_scales,
        bias,
        out,
        num_rows,
        weight.n,
        k,
        codes.shape[1],
        scales.shape[1],
        min(weight.group, ONE_GROUP),
        weight.kind,
        form_of(scales),
        offsets is not None,
        output_scales is not None,
        bias is not None,
        per_code,
        per_byte,
        tile_rows,
        tile_n,
        step,
        **config.options,
    )
    return out


def quantised_linear(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x: [T, K]; bias: [N], of x.dtype. Returns [T, N] in x.dtype, or in float32 where `wide`."""
    if not x.is_cuda:
        return reference(x, weight, bias, wide=wide)
    if wide or len(x) <= FEW_ROWS:
        return launch(x, weight, bias, wide=wide)
    out = torch.cat([F.linear(x, values.to(x.dtype)) for values in _slices(weight)], dim=1)
    return out if bias is None else out + bias
