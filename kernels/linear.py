"""Matrix products with a weight that is held once, and the embedding that reads rows of the same weight.

    linear:     out = x · weightᵀ + bias
    embedding:  out[t] = weight[token_ids[t]]

On CUDA this is the vendor's GEMM through torch; there is no Triton kernel to beat it. On a CPU the weight is packed
into panels of columns (kernels/cpu/product.h), which is all that is kept of it. A quantised weight stays quantised in
memory (kernels/quantised_linear.py); on a CPU the panels of its codes are expanded in registers
(kernels/cpu/quantised.h).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import fp8_linear, quantised_linear
from kernels.cpu.library import Library, library_for
from kernels.ordered_columns import ordered_columns
from kernels.quantised import Activations, QuantisedWeight, by_input, dequantise

WIDE_COLUMNS = 8192


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedLinear:
    """One weight as the kernel wants it. With tied embeddings, one of these serves both `linear` and `embedding`."""

    weight: Tensor  # [n, k], contiguous; panels, one dimension, where there is a library
    bias: Tensor | None  # [n], of `dtype`
    n: int
    k: int  # inputs
    dtype: torch.dtype  # of x, and of what an embedding returns
    library: Library | None = None  # what packed the weight, and alone can read it
    quantised: QuantisedWeight | None = None  # where there is no library; `weight` is its codes; contiguous, no order
    order: Tensor | None = None  # [columns] int64: the input that each column of the weight is of, -1: of none
    activations: Activations = "kept"  # what rows are rounded to before the product


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


def pack_quantised(weight: QuantisedWeight, dtype: torch.dtype, bias: Tensor | None = None) -> PackedLinear:
    """As `pack`. `dtype` is that of activations and of bias, [N]."""
    assert bias is None or (bias.shape == (weight.n,) and bias.dtype == dtype)
    library = library_for(weight.codes.new_empty(0, dtype=dtype))
    bias = None if bias is None else bias.contiguous()
    order, inputs, activations = weight.order, weight.inputs, weight.activations
    weight = dataclasses.replace(weight, order=None)
    if library is None:
        weight = weight.with_rows(*(None if tensor is None else tensor.contiguous() for tensor in weight.tensors()))
        return PackedLinear(weight.codes, bias, weight.n, inputs, dtype, None, weight, order, activations)
    return PackedLinear(
        library.pack_quantised(weight), bias, weight.n, inputs, dtype, library, None, order, activations
    )


def unpack(packed: PackedLinear) -> Tensor:
    """[N, K]: in float32 where the weight is quantised, a copy where it is packed."""
    if packed.library is not None:
        columns = packed.k if packed.order is None else packed.order.numel()
        return by_input(packed.library.unpack(packed.weight, packed.n, columns), packed.order)
    return packed.weight if packed.quantised is None else by_input(dequantise(packed.quantised), packed.order)


def reference(x: Tensor, packed: PackedLinear, *, wide: bool = False) -> Tensor:
    x = x if packed.activations == "kept" else fp8_linear.rounded(x)
    if packed.quantised is not None and packed.order is None:
        return quantised_linear.reference(x, packed.quantised, packed.bias, wide=wide)
    weight = unpack(packed)
    if weight.dtype == x.dtype and not wide:
        return F.linear(x, weight, packed.bias)
    if x.is_cuda and packed.bias is None and x.dtype == weight.dtype != torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)  # the sums of the GEMM, as they are
    # In blocks of columns, so that no second copy of a large weight is made.
    out = torch.cat([F.linear(x.float(), block.float()) for block in torch.split(weight, WIDE_COLUMNS)], dim=1)
    out = out if packed.bias is None else out + packed.bias.float()
    return out if wide else out.to(x.dtype)


def linear(x: Tensor, packed: PackedLinear, *, wide: bool = False) -> Tensor:
    """x: [T, K] in packed.dtype. Returns [T, N] in x.dtype, or in float32 where `wide`: on a CPU the sums themselves,
    not rounded in between."""
    assert x.shape[1] == packed.k
    assert x.dtype == packed.dtype
    if packed.order is not None:
        x = ordered_columns(x, packed.order)
    if packed.activations == "fp8":
        if packed.quantised is not None and fp8_linear.multiplies(x.device, packed.quantised):
            return fp8_linear.launch(x, packed.quantised, packed.bias, wide=wide)
        x = fp8_linear.rounded(x)
    if packed.quantised is not None:
        return quantised_linear.quantised_linear(x, packed.quantised, packed.bias, wide=wide)
    if packed.library is None:
        return reference(x, packed, wide=wide)
    return packed.library.linear(x, packed.weight, packed.bias, packed.n, wide=wide)


def embedding(token_ids: Tensor, packed: PackedLinear) -> Tensor:
    """token_ids: [T] int64, each in [0, N). Returns [T, K] in packed.dtype."""
    if packed.library is not None:
        columns = packed.k if packed.order is None else packed.order.numel()
        rows = packed.library.embedding(token_ids, packed.weight, packed.n, columns, packed.dtype)
        return by_input(rows, packed.order)
    if packed.quantised is not None:
        return by_input(dequantise(packed.quantised[token_ids]).to(packed.dtype), packed.order)
    return F.embedding(token_ids, packed.weight)
