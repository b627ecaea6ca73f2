"""A linear layer whose weight is chosen row by row: the grouped GEMM of a mixture of experts.

    out[s] = weight_e · x[s // slots_per_row] + bias_e,   e = the expert of slot s

Slot t * experts_per_token + j is what token t asks of its j-th expert. On a GPU a product is one launch over the slots
in the order of their expert (as in MegaBlocks, Gale et al. 2022, arXiv:2211.15841), whose tiles are counted from shapes
alone: nothing waits for the device. Weights of x's dtype have their kernel here, quantised ones in
kernels/grouped_quantised_linear.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear, tuning
from kernels.jit import jit, tl, triton
from kernels.linear import PackedLinear
from kernels.quantised import alike

ALIGNMENT_BYTES = 16  # of the widest load


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GroupedWeights:
    """One weight of each expert, all of one form, as the kernels find them."""

    first: PackedLinear  # whose form all have
    addresses: Tensor  # [2, E] int64: of weights or codes, of biases
    factors: Tensor  # [3, E] int64: of scales, of offsets, of output scales
    aligned: bool  # every row of every weight begins at a multiple of ALIGNMENT_BYTES

    @property
    def num_experts(self) -> int:
        return self.addresses.shape[1]


def group(weights: Sequence[PackedLinear]) -> GroupedWeights | None:
    """None: one launch cannot compute them all, for their forms differ, or only linear.linear reads them. The caller
    keeps the weights, whose memory is read."""
    first, quantised = weights[0], [weight.quantised for weight in weights if weight.quantised is not None]
    if any(weight.library is not None or weight.order is not None for weight in weights):
        return None
    if len({(weight.n, weight.k, weight.dtype, weight.bias is None) for weight in weights}) > 1:
        return None
    if quantised and (len(quantised) < len(weights) or not alike(quantised)):
        return None
    rows: list[Sequence[Tensor | None]] = [[weight.weight for weight in weights], [weight.bias for weight in weights]]
    for place in range(1, 4):
        rows.append([weight.tensors()[place] for weight in quantised] or [None] * len(weights))
    table = torch.tensor([[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in rows])
    row_bytes = first.weight.shape[1] * first.weight.element_size()
    aligned = not (row_bytes % ALIGNMENT_BYTES or bool((table[:2] % ALIGNMENT_BYTES).any()))
    table = table.to(first.weight.device)
    return GroupedWeights(first, table[:2], table[2:], aligned)


def reference(
    x: Tensor,
    weights: Sequence[PackedLinear],
    expert_ids: Tensor,
    slots_per_row: int,
    *,
    wide: bool = False,
    product: Callable[..., Tensor] = linear.reference,
) -> Tensor:
    """[R, N], expert by expert: `product` is linear.linear or its reference. expert_ids: [T, k]; slots without an
    expert are 0."""
    assert ((expert_ids >= -1) & (expert_ids < len(weights))).all()
    experts = expert_ids.flatten()
    out = x.new_zeros(experts.numel(), weights[0].n, dtype=torch.float32 if wide else x.dtype)
    for expert, weight in enumerate(weights):
        slots = (experts == expert).nonzero().flatten()
        if slots.numel():
            out[slots] = product(x[slots // slots_per_row], weight, wide=wide)
    return out


@jit
def slots_of_tile(
    tile,
    slots_ptr,  # [R] int64, in order of their expert
    starts_ptr,  # [E + 1] int64: the slots of expert e are [starts[e], starts[e + 1])
    first_tiles_ptr,  # [E + 1] int64, in tiles of TILE_ROWS slots
    num_experts,
    TILE_ROWS: tl.constexpr,
):
    """The expert that has `tile`, its slots, and which of them are."""
    low = 0
    high = num_experts
    while high - low > 1:  # the last expert whose first tile is not after `tile`
        middle = (low + high) // 2
        if tl.load(first_tiles_ptr + middle) <= tile:
            low = middle
        else:
            high = middle
    first = tl.load(starts_ptr + low) + (tile - tl.load(first_tiles_ptr + low)) * TILE_ROWS
    place = first + tl.arange(0, TILE_ROWS)
    live = place < tl.load(starts_ptr + low + 1)
    return low, tl.load(slots_ptr + place, live, other=0), live


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_experts"])
def _kernel(
    x_ptr,  # [rows, K], contiguous
    addresses_ptr,  # [2, E] int64, of weights [N, K] of x's dtype and of biases [N]
    slots_ptr,
    starts_ptr,
    first_tiles_ptr,
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
    """One program per tile of one expert's slots and TILE_N columns."""
    tile = tl.program_id(0)
    if tile >= tl.load(first_tiles_ptr + num_experts):
        return
    expert, slot, live = slots_of_tile(tile, slots_ptr, starts_ptr, first_tiles_ptr, num_experts, TILE_ROWS)
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


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Order:
    """The slots with those of one expert together."""

    slots: Tensor  # [R] int64; those without an expert come last
    starts: Tensor  # [E + 1] int64
    _first_tiles: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def rows_per_expert(self) -> int:
        return self.slots.numel() // (self.starts.numel() - 1)

    def first_tiles(self, tile_rows: int) -> Tensor:
        """[E + 1] int64."""
        if tile_rows not in self._first_tiles:
            tiles = (self.starts.diff() + tile_rows - 1) // tile_rows
            self._first_tiles[tile_rows] = F.pad(tiles.cumsum(0), (1, 0))
        return self._first_tiles[tile_rows]

    def most_tiles(self, tile_rows: int) -> int:
        """Tiles that any choice of experts can need."""
        num_slots, num_experts = self.slots.numel(), self.starts.numel() - 1
        return min(num_slots, num_slots // tile_rows + num_experts)


def ordered(expert_ids: Tensor, num_experts: int) -> Order:
    """expert_ids: [T, k] int64, each in [0, num_experts), or -1."""
    experts = torch.where(expert_ids < 0, num_experts, expert_ids).flatten()
    in_order, slots = experts.sort(stable=True)
    return Order(slots, torch.searchsorted(in_order, torch.arange(num_experts + 1, device=experts.device)))


def launch(x: Tensor, weights: GroupedWeights, order: Order, slots_per_row: int, out: Tensor) -> None:
    """x: [rows, K] of the weights' dtype, contiguous; out: [R, N], contiguous, by slot; written where the slot has an
    expert."""
    n, k = weights.first.n, weights.first.k
    config = tuning.choose(
        "grouped_linear",
        x.device,
        rows_per_expert=order.rows_per_expert,
        element_bytes=x.element_size(),
        aligned=weights.aligned,
    )
    tile_rows, tile_n, tile_k = (config.tiles[name] for name in ("rows", "outputs", "depth"))
    _kernel[(order.most_tiles(tile_rows), triton.cdiv(n, tile_n))](
        x,
        weights.addresses,
        order.slots,
        order.starts,
        order.first_tiles(tile_rows),
        out,
        weights.num_experts,
        n,
        k,
        slots_per_row,
        weights.first.bias is not None,
        ALIGNMENT_BYTES if weights.aligned else 1,
        tile_rows,
        tile_n,
        tile_k,
        **config.options,
    )
