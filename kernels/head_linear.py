"""Products of each head's part of a row with a weight of its own, as latent attention has them.

    out[t, h] = weight[h] · x[t, h]

On CUDA this is the vendor's batched GEMM through torch. On a CPU each head's weight is packed as that of a linear layer
is (kernels/linear.py), and a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kernels.cpu.library import Library, library_for


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedHeads:
    weight: Tensor  # [H, n, k], contiguous; where there is a library [H, panels of one head]
    n: int
    k: int  # inputs of a head
    library: Library | None  # what packed the weight, and alone can read it


def pack_heads(weight: Tensor) -> PackedHeads:
    """weight: [H, N, K]. On a CPU the panels are a copy, and the caller drops `weight`."""
    num_outputs, num_inputs = weight.shape[1:]
    library = library_for(weight)
    kept = weight.contiguous() if library is None else torch.stack([library.pack(each) for each in weight])
    return PackedHeads(kept, num_outputs, num_inputs, library)


def reference(x: Tensor, weight: Tensor) -> Tensor:
    """x: [T, H, K]; weight: [H, N, K]. Returns [T, H, N]."""
    return torch.einsum("thk,hnk->thn", x, weight)


def head_linear(x: Tensor, packed: PackedHeads, out: Tensor | None = None) -> Tensor:
    """x: [T, H, K], of the weight's dtype. Returns [T, H, N]: `out`, where it is given. The last dimension of x and out
    is contiguous."""
    assert x.shape[1:] == (packed.weight.shape[0], packed.k)
    if packed.library is None:
        found = reference(x, packed.weight)
        return found if out is None else out.copy_(found)
    out = x.new_empty(*x.shape[:2], packed.n) if out is None else out
    packed.library.head_linear(x, packed.weight, out)
    return out
