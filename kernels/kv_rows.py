"""Row-quantised KV: each row (one token of one head) is D one-byte codes, then the row's float32 scale, D + 4 bytes.

    value[i] = code[i] · scale,    scale = max |value| / 127 (int8) or / 448 (fp8 E4M3, arXiv:2209.05433)

The scale's four bytes lie at D of the row in the machine's order, and are aligned only where D and the strides allow.
Whatever writes rows gives the codes that `quantise_rows` gives: both divisions and the rounding are IEEE's, to nearest,
ties to even.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
