"""The gated feed-forward layers of a mixture of experts, on the rows that go to each.

    out[t] = Σ_j weights[t, j] · (down_e · act(gate_up_e · x[t] + gate_up_bias_e) + down_bias_e),   e = expert_ids[t, j]

Each expert computes what a plain layer would (kernels/linear.py, kernels/gated_activation.py): gate_up and activation
are rounded to x.dtype. What down gives is not: it is weighted and added up in fp32, in order of j, and rounded once.

On a GPU each of the two products is one grouped GEMM (kernels/grouped_linear.py), plain or quantised, and no step waits
for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import (
    fp8_linear,
    gated_activation,
    grouped_fp8_linear,
    grouped_linear,
    grouped_quantised_linear,
    linear,
    tuning,
)
from kernels.cpu.library import Library
from kernels.gated_activation import ActivationKind
from kernels.grouped_linear import GroupedWeights, Order
from kernels.jit import jit, tl, triton
from kernels.linear import PackedLinear


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """The experts of one layer that are held here, E of them. All have the same shapes, dtypes and library."""

    gate_up: tuple[PackedLinear, ...]  # [2 * I, H] each
    down: tuple[PackedLinear, ...]  # [H, I] each
    addresses: Tensor  # [4, E] int64, on their device: of gate_up, its bias, down, its bias; 0 where there is no bias
    grouped: tuple[GroupedWeights, GroupedWeights] | None  # of gate_up, of down: what a GPU computes in one launch each
    apart: bool  # a CPU computes one after the other: columns have an order of their own, or rows are to be rounded

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
    assert all(len({part.bias is None for part in side}) == 1 for side in (gate_up, down))
    addresses = [
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        for side in (gate_up, down)
        for tensors in ([part.weight for part in side], [part.bias for part in side])
    ]
    table = torch.tensor(addresses, device=down[0].weight.device)
    of_gate_up, of_down = (grouped_linear.group(side) for side in (gate_up, down))
    grouped = None if of_gate_up is None or of_down is None else (of_gate_up, of_down)
    apart = any(part.order is not None or part.activations != "kept" for part in parts)
    return PackedExperts(tuple(gate_up), tuple(down), table, grouped, apart)


def reference(
    x: Tensor, experts: PackedExperts, expert_ids: Tensor, weights: Tensor, activation_kind: ActivationKind
) -> Tensor:
    return _one_by_one(x, experts, expert_ids, weights, activation_kind, linear.reference, gated_activation.reference)


def _one_by_one(
    x: Tensor,
    experts: PackedExperts,
    expert_ids: Tensor,
    weights: Tensor,
    activation_kind: ActivationKind,
    product: Callable[..., Tensor],  # linear, or its reference
    activation: Callable[[Tensor, ActivationKind], Tensor],
) -> Tensor:
    """Each expert as a plain layer: everywhere the way of those that no launch computes together."""
    experts_per_token = expert_ids.shape[1]
    gate_up = grouped_linear.reference(x, experts.gate_up, expert_ids, experts_per_token, product=product)
    activated = activation(gate_up, activation_kind)
    answers = grouped_linear.reference(activated, experts.down, expert_ids, 1, wide=True, product=product)
    answers = answers.view(*expert_ids.shape, experts.hidden_size)
    out = x.new_zeros(x.shape, dtype=torch.float32)
    here = (expert_ids >= 0)[..., None]
    for j in range(experts_per_token):
        out += torch.where(here[:, j], weights[:, j, None] * answers[:, j], 0.0)
    return out.to(x.dtype)


@jit
def _combine_kernel(
    answers_ptr,  # [T, EXPERTS_PER_TOKEN, H] fp32, contiguous
    expert_ids_ptr,  # [T, EXPERTS_PER_TOKEN] int64, contiguous
    weights_ptr,  # [T, EXPERTS_PER_TOKEN] fp32, contiguous
    out_ptr,  # [T, H], contiguous, written
    hidden_size,
    EXPERTS_PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per token and BLOCK columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < hidden_size
    sums = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(EXPERTS_PER_TOKEN):
        slot = token * EXPERTS_PER_TOKEN + j
        if tl.load(expert_ids_ptr + slot) >= 0:
            answer = tl.load(answers_ptr + slot * hidden_size + column, mask, other=0.0)
            sums += tl.load(weights_ptr + slot) * answer
    tl.store(out_ptr + token * hidden_size + column, sums.to(out_ptr.dtype.element_ty), mask)


def _product(x: Tensor, weights: GroupedWeights, order: Order, slots_per_row: int, out: Tensor) -> None:
    quantised = weights.first.quantised
    if quantised is None:
        grouped_linear.launch(x, weights, order, slots_per_row, out)
    elif quantised.activations == "fp8" and fp8_linear.multiplies(x.device, quantised):
        grouped_fp8_linear.launch(x, weights, order, slots_per_row, out)
    else:
        x = x if quantised.activations == "kept" else fp8_linear.rounded(x)
        grouped_quantised_linear.launch(x, weights, order, slots_per_row, out)


def launch(
    x: Tensor, experts: PackedExperts, expert_ids: Tensor, weights: Tensor, activation_kind: ActivationKind
) -> Tensor:
    assert experts.grouped is not None
    num_tokens, experts_per_token = expert_ids.shape
    num_slots, hidden_size = expert_ids.numel(), experts.hidden_size
    out = x.new_empty(num_tokens, hidden_size)
    if num_slots == 0:
        return out.zero_()
    expert_ids = expert_ids.contiguous()
    order = grouped_linear.ordered(expert_ids, len(experts.down))
    of_gate_up, of_down = experts.grouped
    gate_up = x.new_empty(num_slots, 2 * experts.intermediate_size)
    _product(x.contiguous(), of_gate_up, order, experts_per_token, gate_up)
    activated = gated_activation.launch(gate_up, activation_kind)
    answers = x.new_empty(num_slots, hidden_size, dtype=torch.float32)
    _product(activated, of_down, order, 1, answers)
    config = tuning.choose("moe_combine", x.device)
    block = min(triton.next_power_of_2(hidden_size), config.tiles["columns"])
    _combine_kernel[(num_tokens, triton.cdiv(hidden_size, block))](
        answers, expert_ids, weights.contiguous(), out, hidden_size, experts_per_token, block, **config.options
    )
    return out


def moe_mlp(
    x: Tensor, experts: PackedExperts, expert_ids: Tensor, weights: Tensor, activation_kind: ActivationKind
) -> Tensor:
    """x: [T, H], of the experts' dtype; expert_ids: [T, k] int64, each in [0, E), or -1 for an expert that is not here
    and adds nothing; weights: [T, k] float32. Returns [T, H] in x.dtype."""
    assert x.shape[1] == experts.hidden_size
    assert x.dtype == experts.down[0].dtype
    assert weights.shape == expert_ids.shape == (x.shape[0], expert_ids.shape[1])
    if experts.library is not None and not experts.apart:
        return experts.library.moe_mlp(
            x,
            experts.addresses,
            (experts.gate_up[0].weight.dtype, experts.down[0].weight.dtype),
            expert_ids,
            weights,
            experts.intermediate_size,
            activation_kind,
        )
    if x.is_cuda and experts.grouped is not None:
        return launch(x, experts, expert_ids, weights, activation_kind)
    return _one_by_one(
        x, experts, expert_ids, weights, activation_kind, linear.linear, gated_activation.gated_activation
    )
