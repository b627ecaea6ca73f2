"""The Triton kernel of kernels/paged_attention.py: flash attention (Dao 2023, arXiv:2307.08691) over tiles of queries ×
heads of one KV head, so that chunks and decodes are one launch. Where tiles are too few to fill the device, the KV
length is split among programs and a second kernel joins their parts by their log-sums. No step waits for the device:
tiles are counted from shapes alone.

A key's dimensions are two powers of two where that is less than one: 576 are 512 + 64, 96 are 64 + 32. Of latent blocks
a tile is read once for keys and values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels import tuning
from kernels.jit import jit, tl, triton
from kernels.kv_rows import LARGEST_CODE, SCALE_BYTES, row_dims


@jit
def _sequence_of(tile, starts_ptr, num_sequences, TILE_QUERIES: tl.constexpr):
    """The last sequence whose first tile, query_starts[s] // TILE_QUERIES + s, is not after `tile`.

    Sequence s so gets at least ceil(queries / TILE_QUERIES) tiles, and all together get T // TILE_QUERIES + S.
    """
    low = 0
    high = num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts_ptr + middle) // TILE_QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@jit
def _load_tile(ptr, places, mask, dtype: tl.constexpr):
    """Elements, int8 codes, or uint8 ones of fp8 E4M3, in `dtype`, which holds each code exactly."""
    stored = tl.load(ptr + places, mask, other=0)
    if ptr.dtype.element_ty == tl.uint8:
        bits = stored.to(tl.uint32)
        # Exponent and fraction as fp32 has them, 120 too low. By arithmetic, since sm_80 knows no fp8.
        stored = ((bits & 0x7F) << 20 | (bits & 0x80) << 24).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return stored.to(dtype)


@jit
def _exponents(scores, factor, scale_ptr, place, held, cap):
    """Products of queries and keys as exp2 takes them: scaled, by the keys' own scales too, and capped."""
    scores *= factor
    if scale_ptr is not None:
        scores *= tl.load(scale_ptr + place // 4, held, other=0.0)[None, :]
    if cap is not None:
        scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)  # cap · tanh
    return scores


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_sequences", "num_tokens", "table_stride"])
def _attend_kernel(
    q_ptr,  # [T, Hkv * GROUP, KEY_DIM], contiguous
    key_ptr,  # [num_blocks, Hkv, block_tokens, KEY_DIM], strided; int8 or uint8 where row-quantised
    value_ptr,  # [num_blocks, Hkv, block_tokens, VALUE_DIM], strided as the keys are
    key_scale_ptr,  # [num_blocks, Hkv, block_tokens] fp32, a quarter of the keys' strides; None: not row-quantised
    value_scale_ptr,  # likewise
    tables_ptr,  # [S, M] int32
    starts_ptr,  # [S + 1] int32
    contexts_ptr,  # [S] int32
    sinks_ptr,  # [Hq] fp32, or None
    out_ptr,  # [T, Hq, VALUE_DIM] as q, or [NUM_SPLITS, T, Hq, VALUE_DIM] fp32 of several; contiguous, written
    log_sums_ptr,  # [NUM_SPLITS, T, Hq] fp32, base 2, contiguous; written where NUM_SPLITS is above 1
    factor,  # scale / ln 2: powers of two are cheaper than those of e. Where capped, scale / softcap · 2 / ln 2
    cap,  # softcap / ln 2, or None
    window,  # None: everything
    num_sequences,
    num_tokens,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    BLOCK_TOKENS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_MAIN: tl.constexpr,  # power of two, at least 16
    KEY_REST: tl.constexpr,  # 0, or likewise; KEY_MAIN + KEY_REST is at least KEY_DIM
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,  # power of two, at least VALUE_DIM and 16; KEY_MAIN where LATENT
    LATENT: tl.constexpr,  # a value is its key's first elements
    GROUP: tl.constexpr,  # query heads per KV head
    TILE_HEADS: tl.constexpr,  # power of two
    TILE_QUERIES: tl.constexpr,  # TILE_QUERIES * TILE_HEADS is at least 16
    TILE_KV: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """One program per tile of queries, of heads of one KV head, and split of the KV length."""
    tile = tl.program_id(0)
    head_tiles: tl.constexpr = (GROUP + TILE_HEADS - 1) // TILE_HEADS
    kv_head = tl.program_id(1) // head_tiles
    split = tl.program_id(2)
    sequence = _sequence_of(tile, starts_ptr, num_sequences, TILE_QUERIES)
    start = tl.load(starts_ptr + sequence)
    num_queries = tl.load(starts_ptr + sequence + 1) - start
    first_query = (tile - start // TILE_QUERIES - sequence) * TILE_QUERIES
    if first_query >= num_queries:
        return
    context = tl.load(contexts_ptr + sequence)
    first_position = context - num_queries + first_query

    row = tl.arange(0, TILE_QUERIES * TILE_HEADS)
    query = first_query + row // TILE_HEADS
    member = tl.program_id(1) % head_tiles * TILE_HEADS + row % TILE_HEADS
    live = (query < num_queries) & (member < GROUP)
    position = context - num_queries + query
    dim = tl.arange(0, KEY_MAIN)
    in_dim = dim < KEY_DIM
    out_row = (start + query).to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + member
    q = tl.load(q_ptr + out_row[:, None] * KEY_DIM + dim[None, :], live[:, None] & in_dim[None, :], other=0.0)
    if KEY_REST > 0:
        rest = KEY_MAIN + tl.arange(0, KEY_REST)
        in_rest = rest < KEY_DIM
        q_rest = tl.load(
            q_ptr + out_row[:, None] * KEY_DIM + rest[None, :], live[:, None] & in_rest[None, :], other=0.0
        )

    # This split's positions are [begin, end) of the [lowest, visible) that any query of the tile sees.
    visible = tl.minimum(first_position + TILE_QUERIES, context)
    lowest = 0 if window is None else tl.maximum(first_position + 1 - window, 0)
    first_tile = lowest // TILE_KV * TILE_KV
    span = tl.cdiv(tl.cdiv(visible - first_tile, NUM_SPLITS), TILE_KV) * TILE_KV
    begin = first_tile + split * span
    end = tl.minimum(begin + span, visible)
    # Finite, so that a row that sees nothing of a tile gets exp2(-inf) = 0 and not exp2(-inf + inf).
    largest = tl.full((TILE_QUERIES * TILE_HEADS,), -1e30, tl.float32)
    total = tl.zeros((TILE_QUERIES * TILE_HEADS,), tl.float32)
    if sinks_ptr is not None and split == 0:  # a weight of 1 at its own logit, with no value
        sinks = tl.load(sinks_ptr + kv_head * GROUP + member, member < GROUP, other=0.0)
        largest = tl.maximum(sinks * 1.4426950408889634, largest)
        total += 1.0
    unit = 1.0 if value_scale_ptr is None else 1e-30
    column = tl.arange(0, VALUE_PADDED)
    in_column = column < VALUE_DIM
    attended = tl.zeros((TILE_QUERIES * TILE_HEADS, VALUE_PADDED), tl.float32)
    for base in range(begin, end, TILE_KV):
        n = base + tl.arange(0, TILE_KV)
        held = n < end if window is None else (n >= lowest) & (n < end)
        block = tl.load(tables_ptr + sequence * table_stride + n // BLOCK_TOKENS, held, other=0).to(tl.int64)
        place = block * block_stride + kv_head * head_stride + (n % BLOCK_TOKENS) * token_stride
        if key_scale_ptr is not None:
            place = tl.multiple_of(place, 4)  # codes are read four at a time
        keys = _load_tile(key_ptr, place[None, :] + dim[:, None], held[None, :] & in_dim[:, None], q.dtype)
        scores = tl.dot(q, keys, input_precision="ieee")
        if KEY_REST > 0:
            more = _load_tile(key_ptr, place[None, :] + rest[:, None], held[None, :] & in_rest[:, None], q.dtype)
            scores = tl.dot(q_rest, more, scores, input_precision="ieee")
        scores = _exponents(scores, factor, key_scale_ptr, place, held, cap)
        seen = held[None, :] & (n[None, :] <= position[:, None])
        if window is not None:
            seen &= n[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        shares, fade = weights, shrink
        if value_scale_ptr is not None:  # in units of the largest scale, or fp16 would lose the small ones
            value_scale = tl.load(value_scale_ptr + place // 4, held, other=0.0)
            larger_unit = tl.maximum(unit, tl.max(value_scale, 0))
            shares = weights * (value_scale / larger_unit)[None, :]
            fade = shrink * (unit / larger_unit)
            unit = larger_unit
        if LATENT:
            values = tl.trans(keys)
        else:
            in_value = held[:, None] & in_column[None, :]
            values = _load_tile(value_ptr, place[:, None] + column[None, :], in_value, q.dtype)
        attended *= fade[:, None]
        attended += tl.dot(shares.to(q.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        largest = larger

    total = tl.where(total > 0, total, 1.0)  # a row that saw nothing keeps attended = 0 and weighs exp2(-1e30) = 0
    attended /= (total / unit)[:, None]
    if NUM_SPLITS > 1:
        out_row += split.to(tl.int64) * num_tokens * (num_kv_heads * GROUP)
        tl.store(log_sums_ptr + out_row, largest + tl.log2(total), live)
    out = out_ptr + out_row[:, None] * VALUE_DIM + column[None, :]
    tl.store(out, attended.to(out_ptr.dtype.element_ty), live[:, None] & in_column[None, :])


@jit(do_not_specialize=["num_rows"])
def _join_kernel(
    partial_ptr,  # [NUM_SPLITS, rows, D] fp32, contiguous
    log_sums_ptr,  # [NUM_SPLITS, rows] fp32, base 2, contiguous
    out_ptr,  # [rows, D], contiguous, written
    num_rows,  # T * Hq
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,
    NUM_SPLITS: tl.constexpr,  # power of two
):
    """One program per row: the splits' parts, weighted by their sums of exponentials."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, NUM_SPLITS)
    dim = tl.arange(0, DIM_PADDED)
    log_sums = tl.load(log_sums_ptr + split * num_rows + row)
    weights = tl.exp2(log_sums - tl.max(log_sums, 0))
    place = (split[:, None].to(tl.int64) * num_rows + row) * HEAD_DIM + dim[None, :]
    parts = tl.load(partial_ptr + place, dim[None, :] < HEAD_DIM, other=0.0)
    joined = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + row * HEAD_DIM + dim, joined.to(out_ptr.dtype.element_ty), dim < HEAD_DIM)


def choose_splits(num_programs: int, most_kv_tokens: int, num_multiprocessors: int) -> int:
    """As many as give every multiprocessor two programs, none shorter than 256 tokens of the longest context.

    A power of two from 1 to 64: each is a compilation.
    """
    wanted = max(1, min(2 * num_multiprocessors // num_programs, most_kv_tokens // 256, 64))
    return 1 << (wanted.bit_length() - 1)


def _split_key(key_dim: int) -> tuple[int, int]:
    """KEY_MAIN and KEY_REST."""
    padded = max(triton.next_power_of_2(key_dim), 16)
    rest = max(triton.next_power_of_2(key_dim - padded // 2), 16)
    return (padded // 2, rest) if padded > 16 and padded // 2 + rest < padded else (padded, 0)


def _codes_and_scales(blocks: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """Blocks as the kernel reads them, and the scales of row-quantised ones where they lie."""
    if blocks.dtype not in LARGEST_CODE:
        return blocks, None
    assert dim % 4 == 0
    scales = blocks.view(torch.uint8)[..., dim : dim + SCALE_BYTES].view(torch.float32)
    assert blocks.stride()[:3] == tuple(4 * stride for stride in scales.stride()[:3])
    return blocks if blocks.dtype == torch.int8 else blocks.view(torch.uint8), scales


def launch(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    num_splits: int | None = None,  # power of two; None: chosen for the device
) -> Tensor:
    """As paged_attention; where row-quantised, D and Dv are multiples of 4, and so are the strides."""
    num_tokens, num_heads, _ = q.shape
    num_kv_heads, block_tokens = key_blocks.shape[1:3]
    key_dim, value_dim = row_dims(key_blocks, value_blocks)
    num_sequences = context_lens.shape[0]
    assert q.is_contiguous()
    assert key_blocks.stride() == value_blocks.stride()
    group = num_heads // num_kv_heads
    key_main, key_rest = _split_key(key_dim)
    shared = value_blocks.data_ptr() == key_blocks.data_ptr()
    latent = shared and value_dim <= key_main
    value_padded = key_main if latent else max(triton.next_power_of_2(value_dim), 16)
    config = tuning.choose(
        "paged_attention",
        q.device,
        group=group,
        dim=max(key_main + key_rest, value_padded),
        only_decodes=num_tokens == num_sequences,
        element_bytes=q.element_size(),
        row_quantised=key_blocks.dtype in LARGEST_CODE,
    )
    tile_heads = min(triton.next_power_of_2(group), config.tiles["rows"])
    tile_queries = config.tiles["rows"] // tile_heads
    num_tiles = num_tokens // tile_queries + num_sequences
    num_head_tiles = num_kv_heads * triton.cdiv(group, tile_heads)
    if num_splits is None:
        num_multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
        most_kv_tokens = block_tables.shape[1] * block_tokens
        if window is not None:
            most_kv_tokens = min(most_kv_tokens, window + tile_queries)
        num_splits = choose_splits(num_tiles * num_head_tiles, most_kv_tokens, num_multiprocessors)

    keys, key_scales = _codes_and_scales(key_blocks, key_dim)
    values, value_scales = (keys, key_scales) if shared else _codes_and_scales(value_blocks, value_dim)
    out = q.new_empty(num_tokens, num_heads, value_dim)
    parts, log_sums = out, None
    if num_splits > 1:
        parts = q.new_empty(num_splits, num_tokens, num_heads, value_dim, dtype=torch.float32)
        log_sums = q.new_empty(num_splits, num_tokens, num_heads, dtype=torch.float32)
    _attend_kernel[(num_tiles, num_head_tiles, num_splits)](
        q,
        keys,
        values,
        key_scales,
        value_scales,
        block_tables,
        query_starts,
        context_lens,
        sinks,
        parts,
        log_sums,
        (scale if softcap is None else 2 * scale / softcap) / math.log(2.0),
        None if softcap is None else softcap / math.log(2.0),
        window,
        num_sequences,
        num_tokens,
        num_kv_heads,
        block_tables.stride(0),
        *key_blocks.stride()[:3],
        block_tokens,
        key_dim,
        key_main,
        key_rest,
        value_dim,
        value_padded,
        latent,
        group,
        tile_heads,
        tile_queries,
        config.tiles["kv_tokens"],
        num_splits,
        **config.options,
    )
    if num_splits > 1:
        num_rows, dim_padded = num_tokens * num_heads, triton.next_power_of_2(value_dim)
        config = tuning.choose("paged_attention_join", q.device, elements=num_splits * dim_padded)
        _join_kernel[(num_rows,)](parts, log_sums, out, num_rows, value_dim, dim_padded, num_splits, **config.options)
    return out.flatten(1)
