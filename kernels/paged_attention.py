"""Causal attention over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180), grouped-query (Ainslie et al. 2023).

    out[query, head] = Σ_n softmax_n(score[n]) v[n],    n over positions [0, position of the query]
    score = scale · q · k[n], or softcap · tanh(that / softcap)

where a window hides the positions before the last `window`, and a sink is one more term of the softmax that brings no
value. Query j of sequence s sits at position context_lens[s] - (query_starts[s + 1] - query_starts[s]) + j; head i
reads KV head i // (Hq / Hkv); position n of a sequence is in block block_tables[s, n // block_tokens] at
n % block_tokens.

The kernel is flash attention (Dao 2023, arXiv:2307.08691) over tiles of queries × the heads of one KV head, so that
chunks and decodes are one launch; where tiles are too few to fill the device, the KV length is split among programs and
a second kernel joins their parts by their log-sums. No step waits for the device: tiles are counted from shapes alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton
from kernels.kv_rows import LARGEST_CODE, dequantise_rows, row_dims


def reference(
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
) -> Tensor:
    num_heads, num_kv_heads = q.shape[1], key_blocks.shape[1]
    key_dim, value_dim = row_dims(key_blocks, value_blocks)
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    out = torch.empty(q.shape[0], num_heads, value_dim, dtype=q.dtype, device=q.device)
    for s, context in enumerate(contexts):
        queries = q[starts[s] : starts[s + 1]]
        num_queries = queries.shape[0]
        begin = 0 if window is None else max(context - num_queries + 1 - window, 0)
        keys = _gather(key_blocks, block_tables[s], begin, context)
        shared = value_blocks.data_ptr() == key_blocks.data_ptr()
        values = keys[..., :value_dim] if shared else _gather(value_blocks, block_tables[s], begin, context)
        grouped = queries.float().transpose(0, 1).reshape(num_kv_heads, -1, num_queries, key_dim)
        scores = grouped @ keys.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(context - num_queries, context, device=q.device)[:, None]
        behind = behind - torch.arange(begin, context, device=q.device)  # [queries, keys], how far back a key lies
        hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            sink_scores = sinks.view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, sink_scores), dim=-1)
        weights = scores.softmax(dim=-1)[..., : context - begin]
        attended = (weights @ values).reshape(num_heads, num_queries, value_dim)
        out[starts[s] : starts[s + 1]] = attended.transpose(0, 1).to(q.dtype)
    return out.flatten(1)


def _gather(blocks: Tensor, table: Tensor, begin: int, end: int) -> Tensor:
    """Positions [begin, end) of one sequence, [Hkv, 1, end - begin, D] float32."""
    block_tokens = blocks.shape[2]
    first = begin // block_tokens
    rows = blocks[table[first : -(-end // block_tokens)].long()].transpose(0, 1).flatten(1, 2)
    rows = rows[:, None, begin - first * block_tokens : end - first * block_tokens]
    return dequantise_rows(rows) if rows.dtype in LARGEST_CODE else rows.float()


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


# What changes from batch to batch is not specialised: a compilation in the middle of serving would take half a second.
@jit(do_not_specialize=["num_sequences", "num_tokens", "table_stride"])
def _attend_kernel(
    q_ptr,  # [T, Hkv * GROUP, D], contiguous
    key_ptr,  # [num_blocks, Hkv, block_tokens, D], strided
    value_ptr,  # [num_blocks, Hkv, block_tokens, D], strided as the keys are
    tables_ptr,  # [S, M] int32
    starts_ptr,  # [S + 1] int32
    contexts_ptr,  # [S] int32
    out_ptr,  # [T, Hq, D] of q's dtype where NUM_SPLITS is 1, else [NUM_SPLITS, T, Hq, D] fp32; contiguous, written
    log_sums_ptr,  # [NUM_SPLITS, T, Hq] fp32, base 2, contiguous; written where NUM_SPLITS is above 1
    scale_log2,  # scale / ln 2: powers of two are cheaper than those of e
    num_sequences,
    num_tokens,
    num_kv_heads,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_PADDED: tl.constexpr,  # power of two, at least HEAD_DIM and 16
    GROUP: tl.constexpr,  # query heads per KV head
    GROUP_PADDED: tl.constexpr,  # power of two, at least GROUP
    TILE_QUERIES: tl.constexpr,  # TILE_QUERIES * GROUP_PADDED is at least 16
    TILE_KV: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
):
    """One program per tile of queries, KV head and split of the KV length."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = _sequence_of(tile, starts_ptr, num_sequences, TILE_QUERIES)
    start = tl.load(starts_ptr + sequence)
    num_queries = tl.load(starts_ptr + sequence + 1) - start
    first_query = (tile - start // TILE_QUERIES - sequence) * TILE_QUERIES
    if first_query >= num_queries:
        return
    context = tl.load(contexts_ptr + sequence)

    row = tl.arange(0, TILE_QUERIES * GROUP_PADDED)
    query = first_query + row // GROUP_PADDED
    member = row % GROUP_PADDED
    live = (query < num_queries) & (member < GROUP)
    position = context - num_queries + query
    dim = tl.arange(0, DIM_PADDED)
    in_dim = dim < HEAD_DIM
    out_row = (start + query).to(tl.int64) * (num_kv_heads * GROUP) + kv_head * GROUP + member
    q = tl.load(q_ptr + out_row[:, None] * HEAD_DIM + dim[None, :], live[:, None] & in_dim[None, :], other=0.0)

    # This split's positions are [begin, end) of the [0, visible) that any query of the tile sees.
    visible = tl.minimum(context - num_queries + first_query + TILE_QUERIES, context)
    span = tl.cdiv(tl.cdiv(visible, NUM_SPLITS), TILE_KV) * TILE_KV
    begin = split * span
    end = tl.minimum(begin + span, visible)
    # Finite, so that a row that sees nothing of a tile gets exp2(-inf) = 0 and not exp2(-inf + inf).
    largest = tl.full((TILE_QUERIES * GROUP_PADDED,), -1e30, tl.float32)
    total = tl.zeros((TILE_QUERIES * GROUP_PADDED,), tl.float32)
    attended = tl.zeros((TILE_QUERIES * GROUP_PADDED, DIM_PADDED), tl.float32)
    for base in range(begin, end, TILE_KV):
        n = base + tl.arange(0, TILE_KV)
        held = n < end
        block = tl.load(tables_ptr + sequence * table_stride + n // BLOCK_TOKENS, held, other=0).to(tl.int64)
        place = block * block_stride + kv_head * head_stride + (n % BLOCK_TOKENS) * token_stride
        keys = tl.load(key_ptr + place[None, :] + dim[:, None], held[None, :] & in_dim[:, None], other=0.0)
        scores = tl.dot(q, keys.to(q.dtype), input_precision="ieee") * scale_log2
        scores = tl.where(held[None, :] & (n[None, :] <= position[:, None]), scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        values = tl.load(value_ptr + place[:, None] + dim[None, :], held[:, None] & in_dim[None, :], other=0.0)
        attended *= shrink[:, None]
        attended += tl.dot(weights.to(q.dtype), values.to(q.dtype), input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        largest = larger

    total = tl.where(total > 0, total, 1.0)  # a row that saw nothing keeps attended = 0 and weighs exp2(-1e30) = 0
    attended /= total[:, None]
    if NUM_SPLITS > 1:
        out_row += split.to(tl.int64) * num_tokens * (num_kv_heads * GROUP)
        tl.store(log_sums_ptr + out_row, largest + tl.log2(total), live)
    out = out_ptr + out_row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out, attended.to(out_ptr.dtype.element_ty), live[:, None] & in_dim[None, :])


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
    assert (window, softcap, sinks) == (None, None, None)
    assert key_blocks.shape == value_blocks.shape
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, block_tokens = key_blocks.shape[1:3]
    num_sequences = context_lens.shape[0]
    assert q.is_contiguous()
    assert key_blocks.stride() == value_blocks.stride()
    group = num_heads // num_kv_heads
    group_padded = triton.next_power_of_2(group)
    dim_padded = max(triton.next_power_of_2(head_dim), 16)
    # Tiles and warps are such that no shape of tests/kernels/test_compile.py spills registers.
    only_decodes, wide = num_tokens == num_sequences, q.dtype == torch.float32
    tile_queries = max((16 if only_decodes else 32 if wide else 64) // group_padded, 1)
    tile_kv = 16 if wide else 64 if dim_padded <= (64 if only_decodes else 128) else 32
    num_warps = 4 if tile_queries * group_padded == 16 else 8
    num_tiles = num_tokens // tile_queries + num_sequences
    if num_splits is None:
        num_multiprocessors = torch.cuda.get_device_properties(q.device).multi_processor_count
        most_kv_tokens = block_tables.shape[1] * block_tokens
        num_splits = choose_splits(num_tiles * num_kv_heads, most_kv_tokens, num_multiprocessors)

    out = torch.empty_like(q)
    parts, log_sums = out, None
    if num_splits > 1:
        parts = q.new_empty(num_splits, num_tokens, num_heads, head_dim, dtype=torch.float32)
        log_sums = q.new_empty(num_splits, num_tokens, num_heads, dtype=torch.float32)
    _attend_kernel[(num_tiles, num_kv_heads, num_splits)](
        q,
        key_blocks,
        value_blocks,
        block_tables,
        query_starts,
        context_lens,
        parts,
        log_sums,
        scale / math.log(2.0),
        num_sequences,
        num_tokens,
        num_kv_heads,
        block_tables.stride(0),
        *key_blocks.stride()[:3],
        block_tokens,
        head_dim,
        dim_padded,
        group,
        group_padded,
        tile_queries,
        tile_kv,
        num_splits,
        num_warps=num_warps,
        num_stages=2,
    )
    if num_splits > 1:
        num_rows = num_tokens * num_heads
        _join_kernel[(num_rows,)](parts, log_sums, out, num_rows, head_dim, dim_padded, num_splits, num_warps=1)
    return out.flatten(1)


def paged_attention(
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
) -> Tensor:
    """Returns [T, Hq * Dv] in q.dtype. Chunks and decodes may be mixed.

    q                         [T, Hq, D], contiguous; the queries of all sequences, one after the other
    key_blocks, value_blocks  [num_blocks, Hkv, block_tokens, D or Dv], views of the KV memory of the same strides; D is
                              dense. Row-quantised ones (kernels/kv_rows.py) have 4 more. Latent attention (DeepSeek-V2,
                              arXiv:2405.04434) has value_blocks = key_blocks[..., :Dv]: what begins at the same memory
                              is the keys' first elements.
    block_tables              [S, M] int32; read only where a query of this call sees a position of the block
    query_starts              [S + 1] int32, rising from 0 to T
    context_lens              [S] int32, tokens in the KV memory including this step's; at least the number of queries
    window                    at least 1: a query at position p sees positions (p - window, p]
    softcap                   above 0: scores become softcap · tanh(scores / softcap) (Gemma 2, arXiv:2408.00118)
    sinks                     [Hq] float32, contiguous: logits that weigh in the softmax and bring no value (gpt-oss,
                              arXiv:2508.10925)
    """
    key_dim, _ = row_dims(key_blocks, value_blocks)
    assert key_dim == q.shape[2]
    assert key_blocks.shape[:3] == value_blocks.shape[:3]
    assert key_blocks.dtype == value_blocks.dtype
    assert key_blocks.stride() == value_blocks.stride()
    assert key_blocks.stride(3) == 1
    assert window is None or window >= 1
    assert softcap is None or softcap > 0
    assert sinks is None or (sinks.dtype == torch.float32 and sinks.shape == q.shape[1:2] and sinks.is_contiguous())
    library = library_for(q, blocks=key_blocks)
    run = launch if q.is_cuda else reference if library is None else library.paged_attention
    return run(
        q,
        key_blocks,
        value_blocks,
        block_tables,
        query_starts,
        context_lens,
        scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
