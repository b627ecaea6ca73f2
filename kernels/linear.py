"""Matrix products with a weight that is held once, and the embedding that reads rows of the same weight.

    linear:     out = x · weightᵀ + bias
    embedding:  out[t] = weight[token_ids[t]]

On CUDA this is the vendor's GEMM through torch; there is no Triton kernel to beat it.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """One weight as the kernel wants it. With tied embeddings, one of these serves both `linear` and `embedding`."""

    weight: Tensor  # [n, k], contiguous
    bias: Tensor | None  # [n]
    n: int
    k: int
    dtype: torch.dtype


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """weight: [N, K]; bias: [N]. Keeps `weight` itself, without a copy, where it is contiguous."""
    num_outputs, num_inputs = weight.shape
    assert bias is None or bias.shape == (num_outputs,)
    return PackedLinear(weight.contiguous(), bias, num_outputs, num_inputs, weight.dtype)


def reference(x: Tensor, packed: PackedLinear) -> Tensor:
    return F.linear(x, packed.weight, packed.bias)


def linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """x: [T, K]. Returns [T, N] in x.dtype."""
    return reference(x, packed)


def embedding(token_ids: Tensor, packed: PackedLinear) -> Tensor:
    """token_ids: [T] int64, each in [0, N). Returns [T, K] in the weight's dtype."""
    return F.embedding(token_ids, packed.weight)
