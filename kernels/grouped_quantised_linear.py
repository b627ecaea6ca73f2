"""The grouped GEMM (kernels/grouped_linear.py) of quantised weights (kernels/quantised.py), expanded in registers.

    out[s, n] = Σ_k x[s // slots_per_row, k] · value_e[n, k] + bias_e[n],   e = the expert of slot s

Codes become numbers of x's dtype and a group's products are summed and then scaled in fp32, as in
kernels/quantised_linear.py, whose code it is. The reference is that of kernels/grouped_linear.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import tuning
from kernels.grouped_linear import ALIGNMENT_BYTES, GroupedWeights, Order, slots_of_tile
from kernels.jit import jit, tl, triton
from kernels.quantised_linear import ONE_GROUP, expanded_sums, expansion, form_of


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_experts"])
def _kernel(
    x_ptr,  # [rows, K], contiguous
    addresses_ptr,  # [2, E] int64, of codes [N, WIDTH] uint8 and of biases [N] of x's dtype
    factors_ptr,  # [3, E] int64, of scales and offsets [N, num_groups], of output scales [N] fp32
    scales_ptr,  # of one expert; those of all have its dtype
    offsets_ptr,  # the same
    slots_ptr,  # [R] int64, in order of their expert
    starts_ptr,  # [E + 1] int64: the slots of expert e are [starts[e], starts[e + 1])
    first_tiles_ptr,  # [E + 1] int64, in tiles of TILE_ROWS slots
    out_ptr,  # [R, N], contiguous, written where the slot has an expert
    num_experts,
    N,
    K,
    WIDTH,
    num_groups,
    group,
    SLOTS_PER_ROW: tl.constexpr,  # slot s reads row s // SLOTS_PER_ROW of x
    KIND: tl.constexpr,
    SCALES: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    HAS_OUTPUT_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that every address of codes is a multiple of
    PER_CODE: tl.constexpr,
    PER_BYTE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program per tile of one expert's slots and TILE_N columns."""
    tile = tl.program_id(0)
    if tile >= tl.load(first_tiles_ptr + num_experts):
        return
    expert, slot, live = slots_of_tile(tile, slots_ptr, starts_ptr, first_tiles_ptr, num_experts, TILE_ROWS)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    in_n = column < N
    codes_ptr = tl.load(addresses_ptr + expert).to(tl.pointer_type(tl.uint8))
    of_scales_ptr = tl.load(factors_ptr + expert).to(tl.pointer_type(scales_ptr.dtype.element_ty))
    of_offsets_ptr = of_scales_ptr
    if HAS_OFFSETS:
        of_offsets_ptr = tl.load(factors_ptr + num_experts + expert).to(tl.pointer_type(offsets_ptr.dtype.element_ty))
    sums = expanded_sums(
        x_ptr + (slot // SLOTS_PER_ROW)[:, None] * K,
        live,
        tl.multiple_of(codes_ptr, ALIGNMENT),
        of_scales_ptr,
        of_offsets_ptr,
        column,
        N,
        K,
        WIDTH,
        num_groups,
        group,
        KIND,
        SCALES,
        HAS_OFFSETS,
        PER_CODE,
        PER_BYTE,
        TILE_ROWS,
        TILE_N,
        STEP,
    )
    if HAS_OUTPUT_SCALES:
        whole_ptr = tl.load(factors_ptr + 2 * num_experts + expert).to(tl.pointer_type(tl.float32))
        sums *= tl.load(whole_ptr + column, in_n, other=0.0)[None, :]
    if HAS_BIAS:
        bias_ptr = tl.load(addresses_ptr + num_experts + expert).to(tl.pointer_type(x_ptr.dtype.element_ty))
        sums += tl.load(bias_ptr + column, in_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + slot[:, None] * N + column[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), live[:, None] & in_n[None, :])


def launch(x: Tensor, weights: GroupedWeights, order: Order, slots_per_row: int, out: Tensor) -> None:
    """As grouped_linear.launch, where weights.first is quantised."""
    quantised = weights.first.quantised
    assert quantised is not None
    codes, scales, offsets, output_scales = quantised.tensors()
    config = tuning.choose(
        "grouped_quantised_linear",
        x.device,
        rows_per_expert=order.rows_per_expert,
        element_bytes=x.element_size(),
        aligned=weights.aligned,
    )
    tile_rows, tile_n, tile_k = (config.tiles[name] for name in ("rows", "outputs", "depth"))
    per_code, per_byte, step = expansion(quantised, tile_k)
    _kernel[(order.most_tiles(tile_rows), triton.cdiv(quantised.n, tile_n))](
        x,
        weights.addresses,
        weights.factors,
        scales.view(torch.uint8) if scales.element_size() == 1 else scales,
        offsets,
        order.slots,
        order.starts,
        order.first_tiles(tile_rows),
        out,
        weights.num_experts,
        quantised.n,
        quantised.k,
        codes.shape[1],
        scales.shape[1],
        min(quantised.group, ONE_GROUP),
        slots_per_row,
        quantised.kind,
        form_of(scales),
        offsets is not None,
        output_scales is not None,
        weights.first.bias is not None,
        ALIGNMENT_BYTES if weights.aligned else 1,
        per_code,
        per_byte,
        tile_rows,
        tile_n,
        step,
        **config.options,
    )
