"""Matrix products with a weight that is held once, and the embedding that reads rows of the same weight.

    linear:     out = x · weightᵀ + bias
    embedding:  out[t] = weight[token_ids[t]]

On CUDA this is the vendor's GEMM through torch; there is no Triton kernel to beat it. On a CPU the weight is packed
into panels of columns (kernels/cpu/product.h), which is all that is kept of it.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import Library, library_for

WIDE_COLUMNS = 8192


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """One weight as the kernel wants it. With tied embeddings, one of these serves both `linear` and `embedding`."""

    weight: Tensor  # [n, k], contiguous; panels, one dimension, where there is a library
    bias: Tensor | None  # [n]
    n: int
    k: int
    dtype: torch.dtype
    library: Library | None = None  # what packed the weight, and alone can read it


def pack(weight: Tensor, bias: Tensor | None = None) -> PackedLinear:
    """weight: [N, K]; bias: [N], of the same dtype. On a CPU the panels are a copy, and the caller drops `weight`;
    elsewhere `weight` itself is kept where it is contiguous."""
    num_outputs, num_inputs = weight.shape
    assert bias is None or (bias.shape == (num_outputs,) and bias.dtype == weight.dtype)
    library = library_for(weight)
    kept = weight.contiguous() if library is None else library.pack(weight)
    return PackedLinear(
        kept, None if bias is None else bias.contiguous(), num_outputs, num_inputs, weight.dtype, library
    )


def unpack(packed: PackedLinear) -> Tensor:
    """[N, K]; a copy where the weight is packed."""
    if packed.library is None:
        return packed.weight
    return packed.library.unpack(packed.weight, packed.n, packed.k)


def reference(x: Tensor, packed: PackedLinear, *, wide: bool = False) -> Tensor:
    weight = unpack(packed)
    if not wide:
        return F.linear(x, weight, packed.bias)
    # In blocks of columns, so that no second copy of a large weight is made.
    out = torch.cat([F.linear(x.float(), block.float()) for block in torch.split(weight, WIDE_COLUMNS)], dim=1)
    return out if packed.bias is None else out + packed.bias.float()


def linear(x: Tensor, packed: PackedLinear, *, wide: bool = False) -> Tensor:
    """x: [T, K] in packed.dtype. Returns [T, N] in x.dtype, or in float32 where `wide`: on a CPU the sums themselves,
    not rounded in between."""
    if packed.library is None:
        return reference(x, packed, wide=wide)
    assert x.shape[1] == packed.k
    assert x.dtype == packed.dtype
    return packed.library.linear(x, packed.weight, packed.bias, packed.n, wide=wide)


def embedding(token_ids: Tensor, packed: PackedLinear) -> Tensor:
    """token_ids: [T] int64, each in [0, N). Returns [T, K] in the weight's dtype."""
    if packed.library is None:
        return F.embedding(token_ids, packed.weight)
    return packed.library.embedding(token_ids, packed.weight, packed.n, packed.k)
