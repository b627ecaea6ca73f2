"""The gate of a SwiGLU feed-forward layer (Shazeer 2020, arXiv:2002.05202).

    out = silu(gate) · up,    silu(g) = g / (1 + exp(-g)),    gate_up = [gate | up] along the last dimension

Computed in fp32 and rounded once.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton


def reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@jit
def _kernel(
    gate_up_ptr,  # [T, 2 * I], contiguous
    out_ptr,  # [T, I], contiguous, written
    intermediate_size,
    BLOCK: tl.constexpr,
):
    """One program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64) * intermediate_size
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < intermediate_size
    gate = tl.load(gate_up_ptr + 2 * row + column, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * row + intermediate_size + column, mask, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask)


def launch(gate_up: Tensor) -> Tensor:
    num_rows, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    block = min(triton.next_power_of_2(intermediate_size), 1024)
    out = gate_up.new_empty(num_rows, intermediate_size)
    _kernel[(num_rows, triton.cdiv(intermediate_size, block))](gate_up.contiguous(), out, intermediate_size, block)
    return out


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2 * I]. Returns [T, I] in the same dtype."""
    assert gate_up.shape[-1] % 2 == 0
    if gate_up.is_cuda:
        return launch(gate_up)
    library = library_for(gate_up)
    return reference(gate_up) if library is None else library.silu_mul(gate_up)
