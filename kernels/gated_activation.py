"""The gate of a gated feed-forward layer (Shazeer 2020, arXiv:2002.05202), gate_up = [gate | up] in the last dimension.

    silu             out = gate · σ(gate) · up
    gelu_tanh        out = gate · (1 + tanh(√(2/π) · (gate + 0.044715 · gate³))) / 2 · up
    swiglu_clamped   gate = min(gate, 7), up = clamp(up, -7, 7), out = gate · σ(1.702 · gate) · (up + 1)

with σ(z) = 1 / (1 + exp(-z)). gelu_tanh is computed as gate · σ(2 · √(2/π) · (...)) · up, the same function, which
cancels nothing where the gate is negative. Computed in fp32 and rounded once.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tuning
from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton

ActivationKind = Literal["silu", "gelu_tanh", "swiglu_clamped"]

# The tanh form of GELU: Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2. What Gemma is trained with.
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715
# gpt-oss: `swiglu` in gpt_oss/torch/model.py of github.com/openai/gpt-oss (alpha and limit).
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0


def reference(gate_up: Tensor, kind: ActivationKind) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    if kind == "silu":
        out = F.silu(gate) * up
    elif kind == "gelu_tanh":
        out = gate * torch.sigmoid(GELU_SLOPE * (gate + GELU_CUBIC * gate**3)) * up
    else:
        gate = gate.clamp(max=SWIGLU_LIMIT)
        out = gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT) + 1)
    return out.to(gate_up.dtype)


@jit
def _kernel(
    gate_up_ptr,  # [T, 2 * I], contiguous
    out_ptr,  # [T, I], contiguous, written
    intermediate_size,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,  # GELU_SLOPE or SWIGLU_ALPHA
    CUBIC: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and BLOCK columns."""
    row = tl.program_id(0).to(tl.int64) * intermediate_size
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < intermediate_size
    gate = tl.load(gate_up_ptr + 2 * row + column, mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * row + intermediate_size + column, mask, other=0.0).to(tl.float32)
    if KIND == "silu":
        steep = gate
    elif KIND == "gelu_tanh":
        steep = SLOPE * (gate + CUBIC * gate * gate * gate)
    else:  # `where`, unlike minimum and maximum, lets a NaN through
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
        steep = SLOPE * gate
    out = gate / (1.0 + tl.exp(-steep)) * up
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask)


def launch(gate_up: Tensor, kind: ActivationKind) -> Tensor:
    num_rows, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    config = tuning.choose("gated_activation", gate_up.device)
    block = min(triton.next_power_of_2(intermediate_size), config.tiles["columns"])
    out = gate_up.new_empty(num_rows, intermediate_size)
    _kernel[(num_rows, triton.cdiv(intermediate_size, block))](
        gate_up.contiguous(),
        out,
        intermediate_size,
        kind,
        SWIGLU_ALPHA if kind == "swiglu_clamped" else GELU_SLOPE,
        GELU_CUBIC,
        SWIGLU_LIMIT,
        block,
        **config.options,
    )
    return out


def gated_activation(gate_up: Tensor, kind: ActivationKind) -> Tensor:
    """gate_up: [T, 2 * I]. Returns [T, I] in the same dtype."""
    assert gate_up.shape[-1] % 2 == 0
    if gate_up.is_cuda:
        return launch(gate_up, kind)
    library = library_for(gate_up)
    return reference(gate_up, kind) if library is None else library.gated_activation(gate_up, kind)
