"""Weights as GPTQ and AWQ checkpoints hold them, rounded to nearest: `pack(weight [N, K])` gives the tensors that are
stored, by suffix in the place of "weight", and the values [N, K] float32 that they stand for.

GPTQ as AutoGPTQ packs (qlinear_cuda `pack`), AWQ as AutoAWQ packs (gemm `from_linear`, `order_map`).
"""

from __future__ import annotations

import torch
from torch import Tensor

Stored = dict[str, Tensor]
_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def gptq(
    weight: Tensor, *, group: int, bits: int = 4, symmetric: bool = True, in_order: bool = True
) -> tuple[Stored, Tensor]:
    """The last group may be short. Not `in_order`: as desc_act groups inputs, in an order that depends on their number
    alone, since all projections that read the same activations have one."""
    num_inputs = weight.shape[1]
    order = torch.arange(num_inputs)
    if not in_order:
        order = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(num_inputs))
    codes, zeros, scales, values = _affine(weight[:, order], group, bits, symmetric)
    back = order.argsort()
    stored = {
        "qweight": _words(codes[:, back], bits).T.contiguous(),
        "qzeros": _words(zeros.T.contiguous() - 1, bits),
        "scales": scales.T.contiguous().half(),
        "g_idx": (back // group).int(),
    }
    return stored, values[:, back]


def awq(weight: Tensor, *, group: int) -> tuple[Stored, Tensor]:
    """K is a multiple of the group."""
    assert weight.shape[1] % group == 0
    codes, zeros, scales, values = _affine(weight, group, 4, symmetric=False)

    def packed(matrix: Tensor) -> Tensor:
        return _words(matrix.view(matrix.shape[0], -1, 8)[:, :, _AWQ_ORDER].flatten(1), 4)

    stored = {
        "qweight": packed(codes.T.contiguous()),
        "qzeros": packed(zeros.T.contiguous()),
        "scales": scales.T.contiguous().half(),
    }
    return stored, values


def _affine(weight: Tensor, group: int, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [N, K], zeros and scales [N, groups], and the values that they stand for."""
    n, k = weight.shape
    groups = torch.nn.functional.pad(weight.float(), (0, -k % group)).view(n, -1, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-4).half().float()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales).round().clamp(1, 2**bits - 1)
    codes = (groups / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, 2**bits - 1)
    values = (codes - zeros[:, :, None]) * scales[:, :, None]
    return codes.view(n, -1)[:, :k].int(), zeros.int(), scales, values.view(n, -1)[:, :k]


def _words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] to [R, C · bits / 32] int32, the first code lowest."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int64) * bits
    words = (codes.reshape(codes.shape[0], -1, per_word).long() << shifts).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()
