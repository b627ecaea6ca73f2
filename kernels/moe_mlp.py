"""The gated feed-forward layers of a mixture of experts, on the rows that go to each.

    out[t] = Σ_j weights[t, j] · (down_e · act(gate_up_e · x[t] + gate_up_bias_e) + down_bias_e),   e = expert_ids[t, j]

Each expert computes what a plain layer would (kernels/linear.py, kernels/gated_activation.py): gate_up and activation
are rounded to x.dtype. What down gives is not: it is weighted and added up in fp32, in order of j, and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import gated_activation, linear
from kernels.cpu.library import Library
from kernels.gated_activation import ActivationKind
from kernels.linear import PackedLinear


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """The experts of one layer that are held here, E of them. All have the same shapes, dtypes and library."""

    gate_up: tuple[PackedLinear, ...]  # [2 * I, H] each
    down: tuple[PackedLinear, ...]  # [H, I] each
    addresses: Tensor  # [4, E] int64, on their device: of gate_up, its bias, down, its bias; 0 where there is no bias

    @property
    def hidden_size(self) -> int:
        return self.down[0].n

    @property
    def intermediate_size(self) -> int:
        return self.down[0].k

    @property
    def library(self) -> Library | None:
        return self.down[0].library


def pack_experts(
    gate_up: Tensor, down: Tensor, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None
) -> PackedExperts:
    """gate_up: [E, 2 * I, H], gates before ups; down: [E, H, I]; gate_up_bias: [E, 2 * I]; down_bias: [E, H]; of one
    dtype. On a CPU what is packed is a copy, and the caller drops the weights."""

    def packed(weight: Tensor, bias: Tensor | None) -> list[PackedLinear]:
        biases = [None] * len(weight) if bias is None else list(bias)
        return [linear.pack(*each) for each in zip(weight, biases, strict=True)]

    return join_experts(packed(gate_up, gate_up_bias), packed(down, down_bias))


def join_experts(gate_up: Sequence[PackedLinear], down: Sequence[PackedLinear]) -> PackedExperts:
    """Of experts that were packed one by one, in any format that linear takes."""
    parts = (*gate_up, *down)
    assert len(gate_up) == len(down) > 0
    assert all((part.n, part.k) == (2 * down[0].k, down[0].n) for part in gate_up)
    assert all((part.n, part.k) == (down[0].n, down[0].k) for part in down)
    assert len({(part.dtype, part.library) for part in parts}) == 1
    assert all(len({part.weight.dtype for part in side}) == 1 for side in (gate_up, down))
    addresses = [
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        for side in (gate_up, down)
        for tensors in ([part.weight for part in side], [part.bias for part in side])
    ]
    return PackedExperts(tuple(gate_up), tuple(down), torch.tensor(addresses, device=down[0].weight.device))


def reference(
    x: Tensor, experts: PackedExperts, expert_ids: Tensor, weights: Tensor, activation_kind: ActivationKind
) -> Tensor:
    num_tokens, experts_per_token = expert_ids.shape
    assert ((expert_ids >= -1) & (expert_ids < len(experts.down))).all()
    answers = x.new_zeros(num_tokens, experts_per_token, experts.hidden_size, dtype=torch.float32)
    for expert, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        if token.numel():
            activated = gated_activation.reference(linear.reference(x[token], gate_up), activation_kind)
            answers[token, choice] = linear.reference(activated, down, wide=True)
    out = x.new_zeros(x.shape, dtype=torch.float32)
    here = (expert_ids >= 0)[..., None]
    for j in range(experts_per_token):
        out += torch.where(here[:, j], weights[:, j, None] * answers[:, j], 0.0)
    return out.to(x.dtype)


def moe_mlp(
    x: Tensor, experts: PackedExperts, expert_ids: Tensor, weights: Tensor, activation_kind: ActivationKind
) -> Tensor:
    """x: [T, H], of the experts' dtype; expert_ids: [T, k] int64, each in [0, E), or -1 for an expert that is not here
    and adds nothing; weights: [T, k] float32. Returns [T, H] in x.dtype."""
    assert x.shape[1] == experts.hidden_size
    assert x.dtype == experts.down[0].dtype
    assert weights.shape == expert_ids.shape
    if experts.library is None:
        return reference(x, experts, expert_ids, weights, activation_kind)
    return experts.library.moe_mlp(
        x, experts.addresses, expert_ids, weights, experts.intermediate_size, activation_kind
    )
