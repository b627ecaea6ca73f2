"""Rotary embedding of queries and keys, and the write of keys and values into the paged KV memory, in one pass.

Su et al. 2021 (arXiv:2104.09864), in the rotate-half form of GPT-NeoX and Llama: with h = D/2 at position p,

    out[i]     = x[i] · cos[p, i] - x[i + h] · sin[p, i]
    out[i + h] = x[i + h] · cos[p, i] + x[i] · sin[p, i]        for i in [0, h)

computed in fp32 and rounded once. A slot is block · block_tokens + offset in the block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import library_for
from kernels.jit import jit, tl, triton


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    num_heads: int,
) -> Tensor:
    num_kv_heads, block_tokens, head_dim = key_blocks.shape[1:]
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    rotated, values = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], dim=1)
    low, high = rotated.float().chunk(2, dim=-1)
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    rotated = torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(qkv.dtype)
    queries, keys = torch.split(rotated, [num_heads, num_kv_heads], dim=1)
    block, offset = slots // block_tokens, slots % block_tokens
    key_blocks[block, :, offset] = keys.to(key_blocks.dtype)
    value_blocks[block, :, offset] = values.to(value_blocks.dtype)
    return queries.contiguous()


@jit
def _kernel(
    qkv_ptr,  # [T, Hq + 2 * Hkv, D], contiguous
    cos_ptr,  # [P, D / 2] fp32, contiguous
    sin_ptr,  # [P, D / 2] fp32, contiguous
    positions_ptr,  # [T] int64
    slots_ptr,  # [T] int64
    key_ptr,  # [num_blocks, Hkv, block_tokens, D], strided, written
    value_ptr,  # [num_blocks, Hkv, block_tokens, D], strided as the keys are, written
    q_ptr,  # [T, Hq, D], contiguous, written
    num_heads,
    num_kv_heads,
    block_stride,
    head_stride,
    token_stride,
    BLOCK_TOKENS: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    HALF_PADDED: tl.constexpr,  # power of two, at least HALF
    TILE_HEADS: tl.constexpr,  # power of two
):
    """One program per token and TILE_HEADS of its Hq query, Hkv key and Hkv value heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    lane = tl.arange(0, HALF_PADDED)
    is_query = head < num_heads
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    in_lane = lane[None, :] < HALF

    row = (token * (num_heads + 2 * num_kv_heads) + head[:, None]) * (2 * HALF) + lane[None, :]
    inside = (head[:, None] < num_heads + 2 * num_kv_heads) & in_lane
    plain_low = tl.load(qkv_ptr + row, inside, other=0.0)
    plain_high = tl.load(qkv_ptr + row + HALF, inside, other=0.0)
    angle = tl.load(positions_ptr + token) * HALF + lane
    cos = tl.load(cos_ptr + angle, lane < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, lane < HALF, other=0.0)[None, :]
    low = plain_low.to(tl.float32)
    high = plain_high.to(tl.float32)
    # One rounding to the activations' dtype, as for the queries, before the blocks' dtype.
    turned_low = (low * cos - high * sin).to(plain_low.dtype)
    turned_high = (high * cos + low * sin).to(plain_low.dtype)

    out = (token * num_heads + head[:, None]) * (2 * HALF) + lane[None, :]
    tl.store(q_ptr + out, turned_low, is_query[:, None] & in_lane)
    tl.store(q_ptr + out + HALF, turned_high, is_query[:, None] & in_lane)

    slot = tl.load(slots_ptr + token)
    place = (slot // BLOCK_TOKENS) * block_stride + (slot % BLOCK_TOKENS) * token_stride + lane[None, :]
    kv_type = key_ptr.dtype.element_ty
    key = key_ptr + place + (head[:, None] - num_heads) * head_stride
    tl.store(key, turned_low.to(kv_type), is_key[:, None] & in_lane)
    tl.store(key + HALF, turned_high.to(kv_type), is_key[:, None] & in_lane)
    value = value_ptr + place + (head[:, None] - num_heads - num_kv_heads) * head_stride
    tl.store(value, plain_low.to(kv_type), is_value[:, None] & in_lane)
    tl.store(value + HALF, plain_high.to(kv_type), is_value[:, None] & in_lane)


def launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    num_heads: int,
) -> Tensor:
    num_tokens = qkv.shape[0]
    num_kv_heads, block_tokens, head_dim = key_blocks.shape[1:]
    half_padded = triton.next_power_of_2(head_dim // 2)
    tile_heads = min(triton.next_power_of_2(num_heads + 2 * num_kv_heads), max(1024 // half_padded, 1))
    queries = qkv.new_empty(num_tokens, num_heads, head_dim)
    _kernel[(num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, tile_heads))](
        qkv.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        positions,
        slots,
        key_blocks,
        value_blocks,
        queries,
        num_heads,
        num_kv_heads,
        *key_blocks.stride()[:3],
        block_tokens,
        head_dim // 2,
        half_padded,
        tile_heads,
    )
    return queries


def rope_kv_write(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    num_heads: int,
) -> Tensor:
    """Returns the rotated queries, [T, Hq, D]; rotated keys and plain values go to their slots, in the blocks' dtype.

    qkv                       [T, (Hq + 2 * Hkv) * D]: queries, keys, values
    cos, sin                  [P, D / 2] fp32, of every position
    positions, slots          [T] int64; slots are all different
    key_blocks, value_blocks  [num_blocks, Hkv, block_tokens, D], written; strided alike in the KV memory; D is dense
    """
    assert key_blocks.shape == value_blocks.shape
    assert key_blocks.stride(3) == value_blocks.stride(3) == 1
    assert key_blocks.stride() == value_blocks.stride()
    library = library_for(qkv, key_blocks)
    run = launch if qkv.is_cuda else reference if library is None else library.rope_kv_write
    return run(qkv, cos, sin, positions, slots, key_blocks, value_blocks, num_heads)
