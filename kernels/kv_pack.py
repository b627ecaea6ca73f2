"""Rows of paged KV copied between two memories, cut into blocks as each is: into other dtypes and digested on the way.

    pack     a sequence's scattered blocks, of some layers and heads    ->  blocks that lie side by side
    unpack   the way back

A memory is [num_blocks, layers, planes, heads, block_tokens, row] (spec/layout.py), or some layers and heads of one;
token t of a sequence lies in block table[t // block_tokens] at slot t % block_tokens. Rows of another dtype become what
kernels/kv_rows.py says.

The digest's sums are those of kvtransfer/row_sums.py (formula and sources there) over the rows as they are written.
They can be added up in any order, so each program of the kernel leaves its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import tuning
from kernels.jit import jit, tl, triton
from kernels.kv_row_sums import accumulated, factors, scrambled, secret_on, terms, words_of
from kernels.kv_rows import (
    LARGEST_CODE,
    SCALE_BYTES,
    convert_rows,
    decoded,
    encoded,
    largest_size,
    scale_of,
)
from kernels.row_digest import BLOCK_STRIPES, PRIME, STRIPE_BYTES

NUM_SUMS = 9  # eight, and behind them how many bytes the rows have
_BLOCK_BYTES = STRIPE_BYTES * BLOCK_STRIPES
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Corner(NamedTuple):
    """What [:, 0, :, 0] of both memories is in the model: of it the digest takes a row's place."""

    layer: int
    head: int


# ---- reference -------------------------------------------------------------------------------------------------------


def reference(
    source: Tensor,
    source_table: Tensor,
    target: Tensor,
    target_table: Tensor,
    first_token: int,
    num_tokens: int,
    *,
    table_token: int = 0,
    corner: Corner | None = None,
) -> Tensor | None:
    tokens = torch.arange(first_token - table_token, first_token - table_token + num_tokens, device=source.device)
    from_block, from_slot = source_table[tokens // source.shape[4]], tokens % source.shape[4]
    to_block, to_slot = target_table[tokens // target.shape[4]], tokens % target.shape[4]
    sums = torch.zeros(NUM_SUMS, dtype=torch.int64, device=source.device)
    for layer in range(source.shape[1]):  # one at a time: what is between is float32
        rows = source.view(torch.uint8)[:, layer][from_block, :, :, from_slot].view(
            source.dtype
        )  # torch indexes no fp8
        written = convert_rows(rows, target.dtype).view(torch.uint8)
        target.view(torch.uint8)[:, layer][to_block, :, :, to_slot] = written
        if corner is not None:
            planes, heads = (torch.arange(size, device=source.device) for size in source.shape[2:4])
            planes += (corner.layer + layer) * source.shape[2]
            heads += corner.head
            places = (tokens + table_token)[:, None, None] | planes[:, None] << 48 | heads << 32
            sums[:8] += terms(written, places).sum((0, 1, 2))
            sums[8] += written.numel()
    return None if corner is None else sums


# ---- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _row_scales(row_ptr, live, DIM: tl.constexpr):
    """The float32 behind each row's codes, wherever it lies."""
    byte = tl.arange(0, 4)[None, :]
    parts = tl.load(row_ptr[:, None] + DIM + byte, live[:, None] & (byte >= 0), other=0).to(tl.uint32)
    return tl.sum(parts << (8 * byte).to(tl.uint32), 1).to(tl.uint32).to(tl.float32, bitcast=True)


@jit
def _numbers(row_ptr, column, live, scales, LARGEST: tl.constexpr, DIM: tl.constexpr):
    """[rows, columns] fp32, 0 behind the row's end."""
    stored = tl.load(row_ptr[:, None] + column[None, :], live[:, None] & (column < DIM)[None, :], other=0)
    return stored.to(tl.float32) if LARGEST == 0 else decoded(stored, LARGEST) * scales[:, None]


@jit
def _with_scales(codes, scales, column, DIM: tl.constexpr):
    """uint8 [rows, columns]: behind the DIM codes the four bytes of the row's scale."""
    shift = tl.minimum(tl.maximum(column - DIM, 0), 3) * 8
    scale_bytes = (scales.to(tl.uint32, bitcast=True)[:, None] >> shift.to(tl.uint32)[None, :]).to(tl.uint8)
    return tl.where((column < DIM)[None, :], codes, tl.where((column < DIM + 4)[None, :], scale_bytes, 0)).to(tl.uint8)


# What changes from chunk to chunk is not specialised: a compilation in the middle of serving would take half a second.
@jit(
    do_not_specialize=[
        "first_token",
        "num_tokens",
        "table_token",
        "num_layers",
        "num_heads",
        "first_plane",
        "first_head",
    ]
)
def _kernel(
    source_ptr,  # [num_blocks, layers, planes, heads, SOURCE_TOKENS, row], strided; uint8 where row-quantised
    source_table_ptr,  # int64
    target_ptr,  # [num_blocks, layers, planes, heads, TARGET_TOKENS, row], strided, written; likewise
    target_table_ptr,  # int64
    secret_ptr,  # [24] int64
    sums_ptr,  # [programs, 9] int64, contiguous, written; None: no digest
    first_token,  # of the tables' tokens
    num_tokens,
    table_token,  # the tables' first, in the sequence
    num_layers,
    num_planes,
    num_heads,
    first_plane,  # layer · planes + plane of the memories' first, in the model
    first_head,
    source_block_stride,
    source_layer_stride,
    source_plane_stride,
    source_head_stride,
    source_token_stride,
    target_block_stride,
    target_layer_stride,
    target_plane_stride,
    target_head_stride,
    target_token_stride,
    SOURCE_TOKENS: tl.constexpr,
    TARGET_TOKENS: tl.constexpr,
    SOURCE_STEP: tl.constexpr,  # divides where each row begins: a row-quantised one does so at multiples of 4 at best
    TARGET_STEP: tl.constexpr,
    SOURCE_LARGEST: tl.constexpr,  # the largest code of row-quantised rows, 0 of others
    TARGET_LARGEST: tl.constexpr,
    CONVERTS: tl.constexpr,
    DIM: tl.constexpr,  # elements of a row, its scale not among them; of one that is copied as it is, all
    PRIME: tl.constexpr,
    PART_BYTES: tl.constexpr,  # of what is written at a time
    NUM_BLOCKS: tl.constexpr,  # of 16 stripes, in a row
    COLUMNS: tl.constexpr,  # power of two: elements of a row, or of such a block of it
    TILE_ROWS: tl.constexpr,  # power of two
):
    """One program per TILE_ROWS rows, in the order in which the source has them."""
    row = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    block_rows = num_layers * num_planes * num_heads * SOURCE_TOKENS
    token = (first_token // SOURCE_TOKENS + row // block_rows) * SOURCE_TOKENS + row % SOURCE_TOKENS
    live = (token >= first_token) & (token < first_token + num_tokens)
    run = row % block_rows // SOURCE_TOKENS
    head = run % num_heads
    plane = run // num_heads
    layer = plane // num_planes
    source_block = tl.load(source_table_ptr + token // SOURCE_TOKENS, live, other=0)
    target_block = tl.load(target_table_ptr + token // TARGET_TOKENS, live, other=0)
    source_place = source_block * source_block_stride + layer.to(tl.int64) * source_layer_stride
    source_place += plane % num_planes * source_plane_stride + head * source_head_stride
    source_row = source_ptr + tl.multiple_of(source_place + token % SOURCE_TOKENS * source_token_stride, SOURCE_STEP)
    target_place = target_block * target_block_stride + layer.to(tl.int64) * target_layer_stride
    target_place += plane % num_planes * target_plane_stride + head * target_head_stride
    target_row = target_ptr + tl.multiple_of(target_place + token % TARGET_TOKENS * target_token_stride, TARGET_STEP)

    scales = _row_scales(source_row, live, DIM) if SOURCE_LARGEST else None
    scale = None
    if TARGET_LARGEST:
        size = tl.zeros((TILE_ROWS,), tl.float32)
        for block in tl.static_range(NUM_BLOCKS):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            exact = _numbers(source_row, column, live, scales, SOURCE_LARGEST, DIM)
            size = tl.maximum(size, largest_size(exact), propagate_nan=tl.PropagateNan.ALL)
        scale = scale_of(size, TARGET_LARGEST)
    row_parts: tl.constexpr = DIM + 4 if TARGET_LARGEST else DIM
    stripes: tl.constexpr = (row_parts * PART_BYTES + 63) // 64
    found = tl.zeros((TILE_ROWS, 8), tl.uint64)
    for block in tl.static_range(NUM_BLOCKS):
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        written = live[:, None] & (column < row_parts)[None, :]
        if CONVERTS:
            exact = _numbers(source_row, column, live, scales, SOURCE_LARGEST, DIM)
            if TARGET_LARGEST:
                out = _with_scales(encoded(exact, scale, TARGET_LARGEST), scale, column, DIM)
            else:
                out = exact.to(target_ptr.dtype.element_ty)
        else:
            out = tl.load(source_row[:, None] + column[None, :], written, other=0)
        tl.store(target_row[:, None] + column[None, :], out, written)
        if sums_ptr is not None:
            if block:
                found = scrambled(found, secret_ptr, PRIME)
            found = accumulated(found, words_of(out, TILE_ROWS, COLUMNS, PART_BYTES), secret_ptr, 16 * block, stripes)
    if sums_ptr is not None:
        place = ((first_plane + plane).to(tl.uint64) << 48) | ((first_head + head).to(tl.uint64) << 32)
        added = (found ^ (found >> 32)) * factors(place | (table_token + token).to(tl.uint64))
        own = sums_ptr + tl.program_id(0).to(tl.int64) * 9
        total = tl.sum(tl.where(live[:, None], added, 0), 0)
        tl.store(own + tl.arange(0, 8), total.to(tl.int64, bitcast=True))
        tl.store(own + 8, tl.sum(live.to(tl.int64), 0) * (row_parts * PART_BYTES))


# ---- launcher --------------------------------------------------------------------------------------------------------


def launch(
    source: Tensor,
    source_table: Tensor,
    target: Tensor,
    target_table: Tensor,
    first_token: int,
    num_tokens: int,
    *,
    table_token: int = 0,
    corner: Corner | None = None,
) -> Tensor | None:
    converts = source.dtype != target.dtype
    largest = [int(LARGEST_CODE.get(memory.dtype, 0)) if converts else 0 for memory in (source, target)]
    dim = source.shape[5] - (SCALE_BYTES if largest[0] else 0)
    if converts:
        source, target = (
            memory.view(torch.uint8) if memory.dtype in LARGEST_CODE else memory for memory in (source, target)
        )
    else:
        part = _WORDS[_part_bytes(source, target)]
        source, target = (memory.view(torch.uint8).view(part) for memory in (source, target))
        dim = source.shape[5]
    part_bytes = target.dtype.itemsize
    row_parts = target.shape[5]
    num_blocks = triton.cdiv(row_parts * part_bytes, _BLOCK_BYTES)
    columns = _BLOCK_BYTES // part_bytes if num_blocks > 1 else triton.next_power_of_2(row_parts)
    columns = max(columns, STRIPE_BYTES // part_bytes)
    config = tuning.choose("kv_pack", source.device, part_bytes=part_bytes, converts=converts)
    tile_rows = max(config.tiles["elements"] // columns, 1)
    first, size = first_token - table_token, source.shape[4]
    num_groups = triton.cdiv(first + num_tokens, size) - first // size
    num_rows = num_groups * size * source.shape[1] * source.shape[2] * source.shape[3]
    assert num_rows < 2**31
    num_programs = triton.cdiv(num_rows, tile_rows)
    sums = None if corner is None else source_table.new_empty(num_programs, NUM_SUMS)
    at = corner or Corner(0, 0)
    _kernel[(num_programs,)](
        source,
        source_table,
        target,
        target_table,
        None if sums is None else secret_on(source_table.device),
        sums,
        first,
        num_tokens,
        table_token,
        *source.shape[1:4],
        at.layer * source.shape[2],
        at.head,
        *source.stride()[:5],
        *target.stride()[:5],
        size,
        target.shape[4],
        *(math.gcd(16, *memory.stride()[:5]) for memory in (source, target)),
        *largest,
        converts,
        dim,
        PRIME,
        part_bytes,
        num_blocks,
        columns,
        tile_rows,
        **config.options,
    )
    return None if sums is None else sums.sum(0)


def _part_bytes(*memories: Tensor) -> int:
    """The longest word that every row of both consists of, where it lies."""
    numbers = [memory.data_ptr() for memory in memories]
    for memory in memories:
        numbers += [memory.element_size() * number for number in (memory.shape[5], *memory.stride()[:5])]
    return next(size for size in sorted(_WORDS, reverse=True) if all(number % size == 0 for number in numbers))


def copy_rows(
    source: Tensor,
    source_table: Tensor,
    target: Tensor,
    target_table: Tensor,
    first_token: int,
    num_tokens: int,
    *,
    table_token: int = 0,
    corner: Corner | None = None,
) -> Tensor | None:
    """Copies tokens [first_token, first_token + num_tokens) of a sequence. With `corner` the sums over the rows as they
    are written: [9] int64 on the device, what kvtransfer's `Sums` are.

    source, target  [num_blocks, layers, planes, heads, block_tokens, row]: layers, planes and heads as many on both
                    sides, strides and dtypes of their own; rows are dense. Beside a GPU's either may be pinned memory
    source_table,   [as many as the tokens need] int64, on the device; a block of either begins with `table_token` of
    target_table    the sequence, and its tokens follow. No target block stands there twice
    """
    assert source.shape[1:4] == target.shape[1:4]
    assert source.stride(5) == target.stride(5) == 1
    assert table_token <= first_token
    assert num_tokens > 0
    run = launch if source_table.is_cuda else reference
    return run(
        source,
        source_table,
        target,
        target_table,
        first_token,
        num_tokens,
        table_token=table_token,
        corner=corner,
    )
