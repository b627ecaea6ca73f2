"""Rotary embedding of queries and keys, and the write of keys and values into the paged KV memory, in one pass.

Su et al. 2021 (arXiv:2104.09864), in the rotate-half form of GPT-NeoX and Llama: with h = D/2 at position p,

    out[i]     = x[i] · cos[p, i] - x[i + h] · sin[p, i]
    out[i + h] = x[i + h] · cos[p, i] + x[i] · sin[p, i]        for i in [0, h)

computed in fp32 and rounded once. A slot is block · block_tokens + offset in the block.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    rotated, values = heads.split((num_heads + num_kv_heads, num_kv_heads), dim=1)
    low, high = rotated.float().chunk(2, dim=-1)
    c, s = cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)
    rotated = torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(qkv.dtype)
    queries, keys = rotated.split((num_heads, num_kv_heads), dim=1)
    block, offset = slots // block_tokens, slots % block_tokens
    key_blocks[block, :, offset] = keys.to(key_blocks.dtype)
    value_blocks[block, :, offset] = values.to(value_blocks.dtype)
    return queries.contiguous()


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
    key_blocks, value_blocks  [num_blocks, Hkv, block_tokens, D], strided views of the KV memory, written; D is dense
    """
    assert key_blocks.shape == value_blocks.shape
    assert key_blocks.stride(3) == value_blocks.stride(3) == 1
    return reference(qkv, cos, sin, positions, slots, key_blocks, value_blocks, num_heads)
