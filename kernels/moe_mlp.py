"""The gated feed-forward layers of a mixture of experts, on the rows that go to each.

    out[t] = Σ_j weights[t, j] · (down_e · act(gate_up_e · x[t] + gate_up_bias_e) + down_bias_e),   e = expert_ids[t, j]

Each expert computes what a plain layer would (kernels/linear.py, kernels/gated_activation.py): gate_up and activation
are rounded to x.dtype. What down gives is not: it is weighted and added up in fp32, in order of j, and rounded once.

On a GPU both products are one grouped GEMM over the rows in order of their expert (as in MegaBlocks, Gale et al. 2022,
arXiv:2211.15841), whose tiles are counted from shapes alone: no step waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels import gated_activation, linear, tuning
from kernels.cpu.library import Library
from kernels.gated_activation import ActivationKind
from kernels.jit import jit, tl, triton
from kernels.linear import PackedLinear

ALIGNMENT_BYTES = 16  # of the widest load


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class PackedExperts:
    """The experts of one layer that are held here, E of them. All have the same shapes, dtypes and library."""

    gate_up: tuple[PackedLinear, ...]  # [2 * I, H] each
    down: tuple[PackedLinear, ...]  # [H, I] each
    addresses: Tensor  # [4, E] int64, on their device: of gate_up, its bias, down, its bias; 0 where there is no bias
    aligned: bool  # every address is a multiple of ALIGNMENT_BYTES
    ordered: bool  # a weight has its columns in an order of its own, which only kernels/linear.py reads

    @property
    def hidden_size(self) -> int:
        return self.down[0].n

    @property
    def intermediate_size(self) -> int:
        return self.down[0].k

    @property
    def is_quantised(self) -> bool:
        return any(side[0].weight.dtype != side[0].dtype for side in (self.gate_up, self.down))

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
    table = torch.tensor(addresses)
    aligned = not bool((table % ALIGNMENT_BYTES).any())
    ordered = any(part.order is not None for part in parts)
    return PackedExperts(tuple(gate_up), tuple(down), table.to(down[0].weight.device), aligned, ordered)


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
    """Each expert as a plain layer: on a GPU the way of quantised ones, whose products have kernels of their own, and
    everywhere that of ordered ones."""
    num_tokens, experts_per_token = expert_ids.shape
    assert ((expert_ids >= -1) & (expert_ids < len(experts.down))).all()
    answers = x.new_zeros(num_tokens, experts_per_token, experts.hidden_size, dtype=torch.float32)
    for expert, (gate_up, down) in enumerate(zip(experts.gate_up, experts.down, strict=True)):
        token, choice = (expert_ids == expert).nonzero(as_tuple=True)
        if token.numel():
            activated = activation(product(x[token], gate_up), activation_kind)
            answers[token, choice] = product(activated, down, wide=True)
    out = x.new_zeros(x.shape, dtype=torch.float32)
    here = (expert_ids >= 0)[..., None]
    for j in range(experts_per_token):
        out += torch.where(here[:, j], weights[:, j, None] * answers[:, j], 0.0)
    return out.to(x.dtype)


@jit
def _expert_of(tile, first_tiles_ptr, num_experts):
    """The last expert whose first tile is not after `tile`: the one that has it, where any does."""
    low = 0
    high = num_experts
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(first_tiles_ptr + middle) <= tile:
            low = middle
        else:
            high = middle
    return low


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_experts"])
def _product_kernel(
    x_ptr,  # [rows, K], contiguous
    addresses_ptr,  # [2, E] int64, of weights [N, K] of x's dtype and of biases [N]
    slots_ptr,  # [R] int64, in order of their expert
    starts_ptr,  # [E + 1] int64: the slots of expert e are [starts[e], starts[e + 1])
    first_tiles_ptr,  # [E + 1] int64, in tiles of TILE_ROWS slots
    out_ptr,  # [R, N], contiguous, written where the slot has an expert
    num_experts,
    N,
    K,
    SLOTS_PER_ROW: tl.constexpr,  # slot s reads row s // SLOTS_PER_ROW of x
    HAS_BIAS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that every address is a multiple of
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """One program per tile of one expert's slots and TILE_N columns: out[s] = weight · x[s // SLOTS_PER_ROW] + bias."""
    tile = tl.program_id(0)
    if tile >= tl.load(first_tiles_ptr + num_experts):
        return
    expert = _expert_of(tile, first_tiles_ptr, num_experts)
    first = tl.load(starts_ptr + expert) + (tile - tl.load(first_tiles_ptr + expert)) * TILE_ROWS
    place = first + tl.arange(0, TILE_ROWS)
    live = place < tl.load(starts_ptr + expert + 1)
    slot = tl.load(slots_ptr + place, live, other=0)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    in_n = column < N
    weight_ptr = tl.load(addresses_ptr + expert).to(tl.pointer_type(x_ptr.dtype.element_ty))
    weight_ptr = tl.multiple_of(weight_ptr, ALIGNMENT)
    step = tl.arange(0, TILE_K)
    row_ptr = x_ptr + (slot // SLOTS_PER_ROW)[:, None] * K + step[None, :]
    panel_ptr = weight_ptr + column.to(tl.int64)[None, :] * K + step[:, None]
    sums = tl.zeros((TILE_ROWS, TILE_N), tl.float32)
    for k in range(0, K, TILE_K):
        in_k = k + step < K
        rows = tl.load(row_ptr + k, live[:, None] & in_k[None, :], other=0.0)
        panel = tl.load(panel_ptr + k, in_k[:, None] & in_n[None, :], other=0.0)
        sums = tl.dot(rows, panel, sums, input_precision="ieee")
    if HAS_BIAS:
        bias_ptr = tl.load(addresses_ptr + num_experts + expert).to(tl.pointer_type(x_ptr.dtype.element_ty))
        sums += tl.load(bias_ptr + column, in_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + slot[:, None] * N + column[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), live[:, None] & in_n[None, :])


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


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Order:
    """Slot t * experts_per_token + j is what token t asks of its j-th expert; those of one expert lie together."""

    slots: Tensor  # [R] int64; those without an expert come last
    starts: Tensor  # [E + 1] int64
    first_tiles: Tensor  # [E + 1] int64
    config: tuning.Config

    @property
    def tile_rows(self) -> int:
        return self.config.tiles["rows"]

    @property
    def most_tiles(self) -> int:
        """Tiles that any choice of experts can need."""
        num_slots, num_experts = self.slots.numel(), self.starts.numel() - 1
        return min(num_slots, num_slots // self.tile_rows + num_experts)


def _ordered(expert_ids: Tensor, num_experts: int, config: tuning.Config) -> _Order:
    experts = torch.where(expert_ids < 0, num_experts, expert_ids).flatten()
    ordered, slots = experts.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(num_experts + 1, device=experts.device))
    tile_rows = config.tiles["rows"]
    tiles = (starts.diff() + tile_rows - 1) // tile_rows
    return _Order(slots, starts, torch.nn.functional.pad(tiles.cumsum(0), (1, 0)), config)


def _is_aligned(experts: PackedExperts, side: tuple[PackedLinear, ...]) -> bool:
    return experts.aligned and side[0].k * side[0].dtype.itemsize % ALIGNMENT_BYTES == 0


def _launch_product(
    x: Tensor, experts: PackedExperts, side: tuple[PackedLinear, ...], order: _Order, slots_per_row: int, out: Tensor
) -> None:
    """out: [R, N], by slot."""
    addresses = experts.addresses[:2] if side is experts.gate_up else experts.addresses[2:]
    tile_n = order.config.tiles["outputs"]
    _product_kernel[(order.most_tiles, triton.cdiv(side[0].n, tile_n))](
        x,
        addresses,
        order.slots,
        order.starts,
        order.first_tiles,
        out,
        len(side),
        side[0].n,
        side[0].k,
        slots_per_row,
        side[0].bias is not None,
        ALIGNMENT_BYTES if _is_aligned(experts, side) else 1,
        order.tile_rows,
        tile_n,
        order.config.tiles["depth"],
        **order.config.options,
    )


def launch(
    x: Tensor, experts: PackedExperts, expert_ids: Tensor, weights: Tensor, activation_kind: ActivationKind
) -> Tensor:
    num_tokens, experts_per_token = expert_ids.shape
    num_slots, num_experts, hidden_size = expert_ids.numel(), len(experts.down), experts.hidden_size
    out = x.new_empty(num_tokens, hidden_size)
    if num_slots == 0:
        return out.zero_()
    expert_ids = expert_ids.contiguous()
    config = tuning.choose(
        "moe_mlp",
        x.device,
        rows_per_expert=num_slots // num_experts,
        element_bytes=x.element_size(),
        aligned=all(_is_aligned(experts, side) for side in (experts.gate_up, experts.down)),
    )
    order = _ordered(expert_ids, num_experts, config)
    gate_up = x.new_empty(num_slots, 2 * experts.intermediate_size)
    _launch_product(x.contiguous(), experts, experts.gate_up, order, experts_per_token, gate_up)
    activated = gated_activation.launch(gate_up, activation_kind)
    answers = x.new_empty(num_slots, hidden_size, dtype=torch.float32)
    _launch_product(activated, experts, experts.down, order, 1, answers)
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
    if experts.library is not None and not experts.ordered:
        return experts.library.moe_mlp(
            x,
            experts.addresses,
            (experts.gate_up[0].weight.dtype, experts.down[0].weight.dtype),
            expert_ids,
            weights,
            experts.intermediate_size,
            activation_kind,
        )
    if x.is_cuda and not experts.is_quantised:
        return launch(x, experts, expert_ids, weights, activation_kind)
    return _one_by_one(
        x, experts, expert_ids, weights, activation_kind, linear.linear, gated_activation.gated_activation
    )
