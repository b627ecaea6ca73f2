"""The product of rows that are rounded to FP8 as they come with a weight of FP8: W8A8 as DeepSeek-V3 has it
(arXiv:2412.19437, section 3.3; DeepGEMM).

    scale[t, g] = 2 ^ ⌈log2(max |x[t, k]| / 448)⌉,  k in block g of 128        at least 2^-126
    code[t, k]  = E4M3(x[t, k] / scale[t, k // 128])                           to nearest, ties to even
    out[t, n]   = Σ_g scale[t, g] · weight_scale[n, g] · Σ_k code[t, k] · weight_code[n, k] + bias[n]

Scales are powers of two, as of V3.1 ("ue8m0"): code · scale is then a number of x's own dtype, but for float16 from
63488 on, so that `rounded(x)` and any product of quantised_linear.py are the same specification. FP8 tensor cores sum a
block of 128; blocks are scaled and added up in fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from kernels import quantised_linear, tuning
from kernels.jit import jit, tl, triton
from kernels.kv_rows import encoded
from kernels.quantised import QuantisedWeight

BLOCK = 128  # columns of a row that share a scale
_LEAST_CAPABILITY = (8, 9)
_ROUND_UP = 0x1FFFFF  # carries into the exponent what is above 1.75 = 448 / 2^8


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, K]. Returns codes [T, K] float8_e4m3fn and scales [T, ceil(K / 128)] float32. Where a number of a block is
    not finite, its scale is not, and reads so."""
    num_rows, k = x.shape
    blocks = torch.nn.functional.pad(x.float(), (0, -k % BLOCK)).view(num_rows, -1, BLOCK)
    sizes = blocks.view(torch.int32) & 0x7FFFFFFF  # which compare as the numbers do, and a NaN is above all
    greatest = sizes.amax(-1) if k else sizes.new_zeros(num_rows, 0)
    exponents = ((greatest + _ROUND_UP >> 23) - 8).clamp(min=1)
    scales = torch.where(greatest >= 0x7F800000, greatest, exponents << 23).view(torch.float32)
    codes = (blocks / scales[:, :, None]).to(torch.float8_e4m3fn)
    return codes.view(num_rows, -1)[:, :k].contiguous(), scales


def rounded(x: Tensor) -> Tensor:
    """What the codes of x: [T, K] stand for, in x.dtype."""
    codes, scales = quantise(x)
    return (codes.float() * scales.repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]).to(x.dtype)


def reference(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    return quantised_linear.reference(rounded(x), weight, bias, wide=wide)


@jit(do_not_specialize=["num_rows"])
def _quantise_kernel(
    x_ptr,  # [T, K], contiguous
    codes_ptr,  # [T, K] uint8, contiguous, written
    scales_ptr,  # [T, num_blocks] fp32, contiguous, written
    num_rows,
    K,
    num_blocks,
    ROUND_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
):
    """One program per TILE_BLOCKS blocks, counted through all rows."""
    block = tl.program_id(0).to(tl.int64) * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)
    live = block < num_blocks * num_rows.to(tl.int64)
    column = (block % num_blocks)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    place = (block // num_blocks)[:, None] * K + column
    mask = live[:, None] & (column < K)
    values = tl.load(x_ptr + place, mask, other=0.0).to(tl.float32)
    greatest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    exponents = tl.maximum((greatest + ROUND_UP >> 23) - 8, 1)
    bits = tl.where(greatest >= 0x7F800000, greatest, exponents << 23)
    scales = bits.to(tl.float32, bitcast=True)
    tl.store(codes_ptr + place, encoded(values, scales, 448), mask)
    tl.store(scales_ptr + block, scales, live)


def quantise_launch(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `quantise`, of K above 0."""
    num_rows, k = x.shape
    num_blocks = triton.cdiv(k, BLOCK)
    codes = x.new_empty(num_rows, k, dtype=torch.uint8)
    scales = x.new_empty(num_rows, num_blocks, dtype=torch.float32)
    config = tuning.choose("fp8_quantise", x.device)
    tile = config.tiles["blocks"]
    _quantise_kernel[(triton.cdiv(num_rows * num_blocks, tile),)](
        x.contiguous(), codes, scales, num_rows, k, num_blocks, _ROUND_UP, BLOCK, tile, **config.options
    )
    return codes.view(torch.float8_e4m3fn), scales


@jit
def fp8_sums(
    x_row_ptr,  # [TILE_ROWS, 1], of rows of K codes
    x_scale_ptr,  # [TILE_ROWS], of rows of num_blocks fp32 scales
    in_rows,  # [TILE_ROWS]
    codes_ptr,  # [N, K] E4M3, contiguous
    scales_ptr,  # [N, num_groups] fp32, contiguous
    column,  # [TILE_N], of the N outputs
    N,
    K,
    num_groups,  # of whole blocks each; 1: a scale per output
    group,
    PER_OUTPUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[TILE_ROWS, TILE_N] fp32."""
    in_n = column < N
    step = tl.arange(0, BLOCK)
    panel_ptr = codes_ptr + column.to(tl.int64)[None, :] * K + step[:, None]
    factor_ptr = scales_ptr + column.to(tl.int64) * num_groups
    sums = tl.zeros((TILE_ROWS, TILE_N), tl.float32)
    for first in range(0, K, BLOCK):
        in_k = first + step < K
        rows = tl.load(x_row_ptr + first + step[None, :], in_rows[:, None] & in_k[None, :], other=0.0)
        panel = tl.load(panel_ptr + first, in_k[:, None] & in_n[None, :], other=0.0)
        factors = tl.load(x_scale_ptr + first // BLOCK, in_rows, other=0.0)[:, None]
        if PER_OUTPUT:
            sums += tl.dot(rows, panel) * factors
        else:
            of_panel = tl.load(factor_ptr + first // group, in_n, other=0.0)[None, :]
            sums += tl.dot(rows, panel) * factors * of_panel
    if PER_OUTPUT:
        sums *= tl.load(factor_ptr, in_n, other=0.0)[None, :]
    return sums


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_rows"])
def _kernel(
    x_ptr,  # [T, K] E4M3, contiguous
    x_scales_ptr,  # [T, num_blocks] fp32, contiguous
    codes_ptr,
    scales_ptr,
    bias_ptr,  # [N]; not read unless HAS_BIAS
    out_ptr,  # [T, N], contiguous, written
    num_rows,
    N,
    K,
    num_blocks,
    num_groups,
    group,
    PER_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per TILE_ROWS rows and TILE_N outputs; those of the same outputs are neighbours."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    in_rows, in_n = row < num_rows, column < N
    place = row.to(tl.int64)
    sums = fp8_sums(
        x_ptr + place[:, None] * K,
        x_scales_ptr + place * num_blocks,
        in_rows,
        codes_ptr,
        scales_ptr,
        column,
        N,
        K,
        num_groups,
        group,
        PER_OUTPUT,
        TILE_ROWS,
        TILE_N,
        BLOCK,
    )
    if HAS_BIAS:
        sums += tl.load(bias_ptr + column, in_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + place[:, None] * N + column[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), in_rows[:, None] & in_n[None, :])


def has_products(device: torch.device) -> bool:
    """Whether its tensor cores multiply FP8."""
    return device.type == "cuda" and _capability(device) >= _LEAST_CAPABILITY


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def fits(weight: QuantisedWeight) -> bool:
    """Whether its scales are of whole blocks, and nothing else belongs to it."""
    plain = weight.offsets is None and weight.output_scales is None and weight.scales.dtype == torch.float32
    return weight.kind == "fp8" and plain and (weight.group % BLOCK == 0 or weight.group >= weight.k)


def multiplies(device: torch.device, weight: QuantisedWeight) -> bool:
    """Whether `launch` does. Where it does not, rounded(x) is multiplied as any x is."""
    return has_products(device) and fits(weight)


def launch(x: Tensor, weight: QuantisedWeight, bias: Tensor | None = None, *, wide: bool = False) -> Tensor:
    """x: [T, K] of any float dtype, not rounded yet; bias: [N], of x.dtype. Returns [T, N] in x.dtype, or in float32
    where `wide`."""
    assert fits(weight)
    num_rows, k = x.shape
    out = x.new_empty(num_rows, weight.n, dtype=torch.float32 if wide else x.dtype)
    if num_rows == 0:
        return out
    x_codes, x_scales = quantise_launch(x)
    scales = weight.scales.contiguous()
    config = tuning.choose("fp8_linear", x.device, num_rows=num_rows, aligned=k % 16 == 0)
    tile_rows, tile_n = (config.tiles[name] for name in ("rows", "outputs"))
    _kernel[(triton.cdiv(num_rows, tile_rows), triton.cdiv(weight.n, tile_n))](
        x_codes,
        x_scales,
        weight.codes.contiguous(),
        scales,
        bias,
        out,
        num_rows,
        weight.n,
        k,
        x_scales.shape[1],
        scales.shape[1],
        weight.group,
        scales.shape[1] == 1,
        bias is not None,
        tile_rows,
        tile_n,
        BLOCK,
        **config.options,
    )
    return out
