"""Rotary embedding of queries and keys, and the write of keys and values into the paged KV memory, in one pass.

Su et al. 2021 (arXiv:2104.09864), in the rotate-half form of GPT-NeoX and Llama: with h = R/2 at position p, for the R
dimensions of a head that turn, x = head[rotary_offset : rotary_offset + R],

    out[i]     = x[i] · cos[p, i] - x[i + h] · sin[p, i]
    out[i + h] = x[i + h] · cos[p, i] + x[i] · sin[p, i]        for i in [0, h)

computed in fp32 and rounded once; the other dimensions stay as they are. Where there are norms, each query or key head
is first normed as kernels/rms_norm.py does (query-key norms of Qwen3 and Gemma 3; Henry et al. 2020, arXiv:2010.04245)
and rounded. A slot is block · block_tokens + offset in the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import rms_norm, tuning
from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton
from kernels.kv_rows import LARGEST_CODE, SCALE_BYTES, encoded, largest_size, quantise_rows, scale_of


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor | None,
    num_heads: int,
    *,
    rotary_offset: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    num_kv_heads = key_blocks.shape[1]
    queries, keys, values = _split_heads(qkv, num_heads, num_kv_heads, value_blocks is not None)
    if query_norm is not None:
        queries, _ = rms_norm.reference(queries, query_norm, norm_eps, offset=norm_offset)
    if key_norm is not None:
        keys, _ = rms_norm.reference(keys, key_norm, norm_eps, offset=norm_offset)
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    _write_rows(key_blocks, slots, _turned(keys, c, s, rotary_offset))
    if value_blocks is not None:
        _write_rows(value_blocks, slots, values)
    return _turned(queries, c, s, rotary_offset)


def _split_heads(qkv: Tensor, num_heads: int, num_kv_heads: int, has_values: bool) -> tuple[Tensor, ...]:
    """Queries [T, Hq, D], keys [T, Hkv, D], values [T, Hkv or 0, D]."""
    sizes = [num_heads, num_kv_heads, num_kv_heads if has_values else 0]
    return torch.split(qkv.reshape(qkv.shape[0], sum(sizes), qkv.shape[1] // sum(sizes)), sizes, dim=1)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, rotary_offset: int) -> Tensor:
    half = cos.shape[-1]
    out = heads.clone(memory_format=torch.contiguous_format)
    low, high = heads[..., rotary_offset:][..., : 2 * half].float().chunk(2, dim=-1)
    out[..., rotary_offset:][..., : 2 * half] = torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    return out


def _write_rows(blocks: Tensor, slots: Tensor, rows: Tensor) -> None:
    block, offset = slots // blocks.shape[2], slots % blocks.shape[2]
    if blocks.dtype in LARGEST_CODE:  # as bytes, since torch has no indexed write of fp8
        blocks.view(torch.uint8)[block, :, offset] = quantise_rows(rows, blocks.dtype).view(torch.uint8)
    else:
        blocks[block, :, offset] = rows.to(blocks.dtype)


@jit
def _norm_weights(weight_ptr, column, mask, offset, HAS_NORM: tl.constexpr):
    """[1, columns] fp32: what a head's normed elements are multiplied by, 1 without a norm."""
    weights = tl.full(column.shape, 1.0, tl.float32)
    if HAS_NORM:
        weights = tl.load(weight_ptr + column, mask, other=0.0).to(tl.float32) + offset
    return weights[None, :]


@jit
def _kernel(
    qkv_ptr,  # [T, Hq + Hkv (+ Hkv), D], contiguous
    cos_ptr,  # [P, HALF] fp32, contiguous
    sin_ptr,  # [P, HALF] fp32, contiguous
    positions_ptr,  # [T] int64
    slots_ptr,  # [T] int64
    key_ptr,  # [num_blocks, Hkv, block_tokens, D], or D + 4 uint8 where LARGEST_CODE; strided, written
    value_ptr,  # the same, where HAS_VALUES
    q_ptr,  # [T, Hq, D], contiguous, written
    query_norm_ptr,  # [D], where HAS_QUERY_NORM
    key_norm_ptr,  # [D], where HAS_KEY_NORM
    num_heads,
    num_kv_heads,
    block_stride,
    head_stride,
    token_stride,
    norm_eps,
    norm_offset,
    HAS_VALUES: tl.constexpr,
    HAS_QUERY_NORM: tl.constexpr,
    HAS_KEY_NORM: tl.constexpr,
    LARGEST_CODE: tl.constexpr,  # of row-quantised blocks, 0 of others
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_OFFSET: tl.constexpr,
    HALF: tl.constexpr,  # of the dimensions that turn
    COLUMNS: tl.constexpr,  # power of two, at least D
    TILE_HEADS: tl.constexpr,  # power of two
):
    """One program per token and TILE_HEADS of its query, key and value heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    first_value = num_heads + num_kv_heads
    num_all = first_value + num_kv_heads if HAS_VALUES else first_value
    is_query = (head < num_heads)[:, None]
    is_key = ((head >= num_heads) & (head < first_value))[:, None]
    is_value = ((head >= first_value) & (head < num_all))[:, None]
    column = tl.arange(0, COLUMNS)
    in_head = (column < HEAD_DIM)[None, :]

    # Each element meets its partner, which another lane has: it is read again, from the cache.
    lane = column - ROTARY_OFFSET
    in_turn = (lane >= 0) & (lane < 2 * HALF)
    partner = tl.where(lane < HALF, column + HALF, column - HALF)
    turns = (is_query | is_key) & in_turn[None, :]
    row = qkv_ptr + (token * num_all + head[:, None]) * HEAD_DIM
    plain = tl.load(row + column[None, :], (head < num_all)[:, None] & in_head, other=0.0)
    out = plain.to(tl.float32)
    across = tl.load(row + partner[None, :], turns, other=0.0).to(tl.float32)
    if HAS_QUERY_NORM or HAS_KEY_NORM:
        scale = tl.rsqrt(tl.sum(out * out, 1) / HEAD_DIM + norm_eps)[:, None]
        for_query = _norm_weights(query_norm_ptr, column, column < HEAD_DIM, norm_offset, HAS_QUERY_NORM)
        for_key = _norm_weights(key_norm_ptr, column, column < HEAD_DIM, norm_offset, HAS_KEY_NORM)
        for_query_across = _norm_weights(query_norm_ptr, partner, in_turn, norm_offset, HAS_QUERY_NORM)
        for_key_across = _norm_weights(key_norm_ptr, partner, in_turn, norm_offset, HAS_KEY_NORM)
        normed = out * scale * tl.where(is_query, for_query, for_key)
        normed_across = across * scale * tl.where(is_query, for_query_across, for_key_across)
        is_normed = (is_query & HAS_QUERY_NORM) | (is_key & HAS_KEY_NORM)
        out = tl.where(is_normed, normed.to(plain.dtype).to(tl.float32), out)
        across = tl.where(is_normed, normed_across.to(plain.dtype).to(tl.float32), across)
    angle = tl.load(positions_ptr + token) * HALF + tl.where(lane < HALF, lane, lane - HALF)
    cos = tl.load(cos_ptr + angle, in_turn, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, in_turn, other=0.0)[None, :]
    turned = out * cos + across * tl.where((lane < HALF)[None, :], -sin, sin)
    # One rounding to the activations' dtype, as for the queries, before the blocks' dtype.
    out = tl.where(turns, turned, out).to(plain.dtype)
    tl.store(q_ptr + (token * num_heads + head[:, None]) * HEAD_DIM + column[None, :], out, is_query & in_head)

    if (tl.program_id(1) + 1) * TILE_HEADS <= num_heads:  # only queries
        return
    slot = tl.load(slots_ptr + token)
    place = (slot // BLOCK_TOKENS) * block_stride + (slot % BLOCK_TOKENS) * token_stride
    key_row = key_ptr + place + (head[:, None] - num_heads) * head_stride
    value_row = value_ptr + place + (head[:, None] - first_value) * head_stride if HAS_VALUES else key_row
    if LARGEST_CODE == 0:
        stored = out.to(key_ptr.dtype.element_ty)
    else:
        exact = out.to(tl.float32)
        scale = scale_of(largest_size(exact), LARGEST_CODE)
        stored = encoded(exact, scale, LARGEST_CODE)
        byte = tl.arange(0, 4)[None, :]
        scale_bytes = (scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)).to(tl.uint8)
        tl.store(key_row + HEAD_DIM + byte, scale_bytes, is_key & (byte >= 0))
        if HAS_VALUES:
            tl.store(value_row + HEAD_DIM + byte, scale_bytes, is_value & (byte >= 0))
    tl.store(key_row + column[None, :], stored, is_key & in_head)
    if HAS_VALUES:
        tl.store(value_row + column[None, :], stored, is_value & in_head)


def launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor | None,
    num_heads: int,
    *,
    rotary_offset: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    num_tokens = qkv.shape[0]
    num_kv_heads, block_tokens = key_blocks.shape[1:3]
    num_all = num_heads + num_kv_heads * (1 if value_blocks is None else 2)
    head_dim = qkv.shape[1] // num_all
    columns = triton.next_power_of_2(head_dim)
    config = tuning.choose("rope_kv_write", qkv.device)
    tile_heads = min(triton.next_power_of_2(num_all), max(config.tiles["elements"] // columns, 1))
    queries = qkv.new_empty(num_tokens, num_heads, head_dim)
    largest_code = int(LARGEST_CODE.get(key_blocks.dtype, 0))
    if largest_code:
        key_blocks = key_blocks.view(torch.uint8)
        value_blocks = None if value_blocks is None else value_blocks.view(torch.uint8)
    _kernel[(num_tokens, triton.cdiv(num_all, tile_heads))](
        qkv.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        positions,
        slots,
        key_blocks,
        value_blocks,
        queries,
        None if query_norm is None else query_norm.contiguous(),
        None if key_norm is None else key_norm.contiguous(),
        num_heads,
        num_kv_heads,
        *key_blocks.stride()[:3],
        float(norm_eps),
        float(norm_offset),
        value_blocks is not None,
        query_norm is not None,
        key_norm is not None,
        largest_code,
        block_tokens,
        head_dim,
        rotary_offset,
        cos.shape[1],
        columns,
        tile_heads,
        **config.options,
    )
    return queries


def rope_kv_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor | None,
    num_heads: int,
    *,
    rotary_offset: int = 0,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 0.0,
    norm_offset: float = 0.0,
) -> Tensor:
    """Returns the rotated queries, [T, Hq, D]; rotated keys and plain values go to their slots, in the blocks' dtype.

    qkv                       [T, (Hq + 2 * Hkv) * D]: queries, keys, values; [T, (Hq + Hkv) * D] without values
    cos, sin                  [P, R / 2] fp32, of every position; the R dimensions from rotary_offset turn, R <= D
    positions, slots          [T] int64; slots are all different
    key_blocks, value_blocks  [num_blocks, Hkv, block_tokens, D], written; strided alike in the KV memory; D is dense;
                              torch.int8 and torch.float8_e4m3fn are row-quantised (kernels/kv_rows.py), D + 4 long;
                              value_blocks is None where a row has no value of its own (a latent of MLA)
    query_norm, key_norm      [D], weights of the norms; with eps and the offset of rms_norm
    """
    shape, strides, dtype = key_blocks.shape, key_blocks.stride(), key_blocks.dtype
    head_dim = shape[3] - (SCALE_BYTES if dtype in LARGEST_CODE else 0)
    assert qkv.shape[1] == (num_heads + shape[1] * (1 if value_blocks is None else 2)) * head_dim
    assert 0 <= rotary_offset <= head_dim - 2 * cos.shape[1]
    assert strides[3] == 1
    if value_blocks is not None:
        assert (value_blocks.shape, value_blocks.stride(), value_blocks.dtype) == (shape, strides, dtype)
    library = library_for(qkv, blocks=key_blocks)
    for norm in (query_norm, key_norm):
        assert norm is None or norm.shape == (head_dim,)
        if norm is not None and norm.dtype != qkv.dtype:
            library = None
    run = launch if qkv.is_cuda else reference if library is None else library.rope_kv_write
    return run(
        qkv,
        cos,
        sin,
        positions,
        slots,
        key_blocks,
        value_blocks,
        num_heads,
        rotary_offset=rotary_offset,
        query_norm=query_norm,
        key_norm=key_norm,
        norm_eps=norm_eps,
        norm_offset=norm_offset,
    )
