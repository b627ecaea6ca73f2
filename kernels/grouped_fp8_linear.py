"""The grouped GEMM (kernels/grouped_linear.py) of rows that are rounded to FP8 with weights of FP8, as
kernels/fp8_linear.py has its formula, whose code it is.

    out[s] = fp8_linear(x[s // slots_per_row], weight_e, bias_e),   e = the expert of slot s

A row is rounded once, whatever number of experts it goes to. The reference is that of kernels/grouped_linear.py.
"""

from __future__ import annotations

from torch import Tensor

from kernels import tuning
from kernels.fp8_linear import BLOCK, fits, fp8_sums, quantise_launch
from kernels.grouped_linear import ALIGNMENT_BYTES, GroupedWeights, Order, slots_of_tile
from kernels.jit import jit, tl, triton


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_experts"])
def _kernel(
    x_ptr,  # [rows, K] E4M3, contiguous
    x_scales_ptr,  # [rows, num_blocks] fp32, contiguous
    addresses_ptr,  # [2, E] int64, of codes [N, K] E4M3 and of biases [N]
    factors_ptr,  # [3, E] int64, of which the first are of scales [N, num_groups] fp32
    bias_ptr,  # of one expert; those of all have its dtype
    slots_ptr,  # [R] int64, in order of their expert
    starts_ptr,  # [E + 1] int64: the slots of expert e are [starts[e], starts[e + 1])
    first_tiles_ptr,  # [E + 1] int64, in tiles of TILE_ROWS slots
    out_ptr,  # [R, N], contiguous, written where the slot has an expert
    num_experts,
    N,
    K,
    num_blocks,
    num_groups,
    group,
    SLOTS_PER_ROW: tl.constexpr,  # slot s reads row s // SLOTS_PER_ROW of x
    PER_OUTPUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that every address of codes is a multiple of
    TILE_ROWS: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per tile of one expert's slots and TILE_N columns."""
    tile = tl.program_id(0)
    if tile >= tl.load(first_tiles_ptr + num_experts):
        return
    expert, slot, live = slots_of_tile(tile, slots_ptr, starts_ptr, first_tiles_ptr, num_experts, TILE_ROWS)
    column = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    in_n = column < N
    codes_ptr = tl.load(addresses_ptr + expert).to(tl.pointer_type(tl.float8e4nv))
    row = slot // SLOTS_PER_ROW
    sums = fp8_sums(
        x_ptr + row[:, None] * K,
        x_scales_ptr + row * num_blocks,
        live,
        tl.multiple_of(codes_ptr, ALIGNMENT),
        tl.load(factors_ptr + expert).to(tl.pointer_type(tl.float32)),
        column,
        N,
        K,
        num_groups,
        group,
        PER_OUTPUT,
        TILE_ROWS,
        TILE_N,
        BLOCK,
    )
    if HAS_BIAS:
        own_ptr = tl.load(addresses_ptr + num_experts + expert).to(tl.pointer_type(bias_ptr.dtype.element_ty))
        sums += tl.load(own_ptr + column, in_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + slot[:, None] * N + column[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), live[:, None] & in_n[None, :])


def launch(x: Tensor, weights: GroupedWeights, order: Order, slots_per_row: int, out: Tensor) -> None:
    """As grouped_linear.launch, of weights that fp8_linear.fits; x is not rounded yet."""
    weight = weights.first.quantised
    assert weight is not None
    assert fits(weight)
    x_codes, x_scales = quantise_launch(x)
    config = tuning.choose(
        "grouped_fp8_linear", x.device, rows_per_expert=order.rows_per_expert, aligned=weights.aligned
    )
    tile_rows, tile_n = (config.tiles[name] for name in ("rows", "outputs"))
    _kernel[(order.most_tiles(tile_rows), triton.cdiv(weight.n, tile_n))](
        x_codes,
        x_scales,
        weights.addresses,
        weights.factors,
        weights.first.bias,
        order.slots,
        order.starts,
        order.first_tiles(tile_rows),
        out,
        weights.num_experts,
        weight.n,
        weight.k,
        x_scales.shape[1],
        weight.scales.shape[1],
        weight.group,
        slots_per_row,
        weight.scales.shape[1] == 1,
        weights.first.bias is not None,
        ALIGNMENT_BYTES if weights.aligned else 1,
        tile_rows,
        tile_n,
        BLOCK,
        **config.options,
    )
