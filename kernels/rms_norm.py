"""RMSNorm with the residual addition before it (Zhang and Sennrich 2019, arXiv:1910.07467).

    stream = x + residual                                               (x alone where there is no residual)
    normed = (offset + weight) · stream / sqrt(mean(stream²) + eps)     mean over the last dimension

The offset is 1 in the Gemma family, whose weights are stored as what is added to 1, and 0 elsewhere. The stream is
rounded to x.dtype first and the mean is taken of what was rounded, in fp32; normed is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import tuning
from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton


def reference(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    stream = x if residual is None else x + residual
    wide = stream.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + offset)).to(x.dtype), stream


@jit
def _kernel(
    x_ptr,  # [T, H], contiguous
    weight_ptr,  # [H]
    residual_ptr,  # [T, H], contiguous, where HAS_RESIDUAL
    normed_ptr,  # [T, H], contiguous, written
    stream_ptr,  # [T, H], contiguous, written where HAS_RESIDUAL
    num_rows,
    hidden_size,
    eps,
    offset,
    HAS_RESIDUAL: tl.constexpr,
    TILE_ROWS: tl.constexpr,  # power of two
    BLOCK: tl.constexpr,  # power of two, at least H
):
    """One program per TILE_ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < num_rows)[:, None] & (column < hidden_size)[None, :]
    place = row[:, None] * hidden_size + column[None, :]
    stream = tl.load(x_ptr + place, mask, other=0.0)
    if HAS_RESIDUAL:
        stream += tl.load(residual_ptr + place, mask, other=0.0)
        tl.store(stream_ptr + place, stream, mask)
    wide = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / hidden_size + eps)
    weight = tl.load(weight_ptr + column, column < hidden_size, other=0.0).to(tl.float32) + offset
    normed = wide * scale[:, None] * weight[None, :]
    tl.store(normed_ptr + place, normed.to(normed_ptr.dtype.element_ty), mask)


def launch(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    num_rows, hidden_size = x.shape
    block = triton.next_power_of_2(hidden_size)
    config = tuning.choose("rms_norm", x.device, columns=block)
    tile_rows = max(config.tiles["elements"] // block, 1)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    normed = torch.empty_like(x)
    stream = x if residual is None else torch.empty_like(x)
    _kernel[(triton.cdiv(num_rows, tile_rows),)](
        x,
        weight,
        residual,
        normed,
        stream,
        num_rows,
        hidden_size,
        eps,
        float(offset),
        residual is not None,
        tile_rows,
        block,
        **config.options,
    )
    return normed, stream


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """x, residual: [T, H]; weight: [H]. Returns (normed, stream), both [T, H] in x.dtype; stream may be x itself."""
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if x.is_cuda:
        return launch(x, weight, eps, residual, offset=offset)
    library = library_for(x, weight)
    if library is not None and weight.dtype == x.dtype:
        return library.rms_norm(x, weight, eps, residual, offset=offset)
    return reference(x, weight, eps, residual, offset=offset)
