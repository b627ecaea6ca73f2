"""RMSNorm with the residual addition before it (Zhang and Sennrich 2019, arXiv:1910.07467).

    stream = x + residual                                    (x alone where there is no residual)
    normed = weight · stream / sqrt(mean(stream²) + eps)     mean over the last dimension

The stream is rounded to x.dtype first and the mean is taken of what was rounded, in fp32; normed is rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton


def reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    stream = x if residual is None else x + residual
    wide = stream.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype), stream


@jit
def _kernel(
    x_ptr,  # [T, H], contiguous
    weight_ptr,  # [H]
    residual_ptr,  # [T, H], contiguous, where HAS_RESIDUAL
    normed_ptr,  # [T, H], contiguous, written
    stream_ptr,  # [T, H], contiguous, written where HAS_RESIDUAL
    hidden_size,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least H
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64) * hidden_size
    column = tl.arange(0, BLOCK)
    mask = column < hidden_size
    stream = tl.load(x_ptr + row + column, mask, other=0.0)
    if HAS_RESIDUAL:
        stream += tl.load(residual_ptr + row + column, mask, other=0.0)
        tl.store(stream_ptr + row + column, stream, mask)
    wide = stream.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / hidden_size + eps)
    weight = tl.load(weight_ptr + column, mask, other=0.0).to(tl.float32)
    tl.store(normed_ptr + row + column, (wide * scale * weight).to(normed_ptr.dtype.element_ty), mask)


def launch(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    num_rows, hidden_size = x.shape
    block = triton.next_power_of_2(hidden_size)
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    normed = torch.empty_like(x)
    stream = x if residual is None else torch.empty_like(x)
    num_warps = min(max(block // 512, 1), 16)
    _kernel[(num_rows,)](
        x, weight, residual, normed, stream, hidden_size, eps, residual is not None, block, num_warps=num_warps
    )
    return normed, stream


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x, residual: [T, H]; weight: [H]. Returns (normed, stream), both [T, H] in x.dtype; stream may be x itself."""
    assert residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if x.is_cuda:
        return launch(x, weight, eps, residual)
    library = library_for(x, weight)
    if library is not None and weight.dtype == x.dtype:
        return library.rms_norm(x, weight, eps, residual)
    return reference(x, weight, eps, residual)
