"""Row-quantised KV: each row (one token of one head) is D one-byte codes, then the row's float32 scale, D + 4 bytes.

    value[i] = code[i] · scale,    scale = max |value| / 127 (int8) or / 448 (fp8 E4M3, arXiv:2209.05433)

The scale's four bytes lie at D of the row in the machine's order, and are aligned only where D and the strides allow.
Whatever writes rows gives the codes that `quantise_rows` gives: both divisions and the rounding are IEEE's, to nearest,
ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import jit, tl

SCALE_BYTES = 4
LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the dtypes of row-quantised blocks


def quantise_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] of a float dtype -> [..., D + 4] of `dtype`, torch.int8 or torch.float8_e4m3fn.

    A row of zeros has scale 0. One with a number that is not finite has a scale that is not, and reads so.
    """
    values, largest = x.float(), LARGEST_CODE[dtype]
    scale = values.abs().amax(-1, keepdim=True) / largest
    # Where the scale is subnormal, and so inexact, a quotient can be above the largest code.
    codes = (values / scale.where(scale != 0, 1.0)).clamp(-largest, largest)
    codes = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
    return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), dim=-1).view(dtype)


def dequantise_rows(rows: Tensor) -> Tensor:
    """[..., D + 4] of torch.int8 or torch.float8_e4m3fn -> [..., D] float32."""
    assert rows.dtype in LARGEST_CODE
    codes, scale = rows[..., :-SCALE_BYTES], rows[..., -SCALE_BYTES:]
    return codes.float() * scale.clone(memory_format=torch.contiguous_format).view(torch.float32)


def row_dims(key_blocks: Tensor, value_blocks: Tensor) -> tuple[int, int]:
    """Elements of a key and of a value in blocks [..., D], row-quantised or not.

    Where both begin at the same memory, a value is its key's first elements, and has its key's scale.
    """
    scale_bytes = SCALE_BYTES if key_blocks.dtype in LARGEST_CODE else 0
    key_dim = key_blocks.shape[-1] - scale_bytes
    if value_blocks.data_ptr() == key_blocks.data_ptr():
        return key_dim, min(value_blocks.shape[-1], key_dim)
    return key_dim, value_blocks.shape[-1] - scale_bytes


def convert_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of any KV dtype -> the same values in rows of `dtype`, rounded to nearest."""
    if rows.dtype == dtype:
        return rows
    values = dequantise_rows(rows) if rows.dtype in LARGEST_CODE else rows
    return quantise_rows(values, dtype) if dtype in LARGEST_CODE else values.to(dtype)


# ---- the same in Triton ----------------------------------------------------------------------------------------------


@jit
def largest_size(values):
    """[rows, columns] fp32 -> [rows]. Sizes compare as integers, where a NaN is above all."""
    return tl.max(tl.abs(values).to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@jit
def scale_of(size, LARGEST_CODE: tl.constexpr):
    return tl.div_rn(size, tl.full(size.shape, LARGEST_CODE, tl.float32))


@jit
def encoded(values, scale, LARGEST_CODE: tl.constexpr):
    """[rows, columns] fp32, [rows] fp32 -> uint8, the codes of `quantise_rows`.

    To fp8 by arithmetic, since sm_80 has no conversion.
    """
    divisor = tl.broadcast_to(tl.where(scale != 0.0, scale, 1.0)[:, None], values.shape)
    quotient = tl.div_rn(values, divisor)
    if LARGEST_CODE == 127:
        quotient = tl.where(quotient > 127.0, 127.0, tl.where(quotient < -127.0, -127.0, quotient))
        codes = (quotient + 12582912.0).to(tl.int32, bitcast=True)  # 1.5 · 2^23: the integer is in the low bits
    else:
        sign = (quotient.to(tl.int32, bitcast=True) >> 24) & 0x80
        size = tl.minimum(tl.abs(quotient), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 8 · 120, what the exponents' biases differ by
        subnormal = (size + 16384.0).to(tl.int32, bitcast=True) & 0x7F  # 2^14, whose last bit is worth 2^-9
        codes = tl.where(size < 0.015625, subnormal, normal) | sign
    return codes.to(tl.uint8)


@jit
def decoded(codes, LARGEST_CODE: tl.constexpr):
    """uint8 -> fp32: what each code stands for, before its row's scale."""
    bits = codes.to(tl.uint32)
    if LARGEST_CODE == 127:
        numbers = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        # Exponent and fraction as fp32 has them, 120 too low. By arithmetic, since sm_80 knows no fp8.
        low = ((bits & 0x7F) << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True)
        numbers = tl.where((bits & 0x7F) == 0x7F, float("nan"), low * 1.329227995784916e36)
    return numbers
