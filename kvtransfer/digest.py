"""The digest of KV content: what the producer computed and what landed, compared as 16 bytes.

XXH3-128 (a checksum against mistakes, not a signature: the ticket is what is signed) over the bytes of the tokens in
canonical order (layer, plane, head, token), so that block size and block ids leave no trace in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from spec.errors import InvalidParameter

_STAGE_BYTES = 1 << 20  # gathered and hashed while it is in the core's cache


def chunk_digest(kv: torch.Tensor, block_ids: Sequence[int], first_token: int, num_tokens: int) -> bytes:
    """16 bytes over tokens [first_token, first_token + num_tokens) of a sequence.

    kv         [num_blocks, num_layers, planes, num_kv_heads, block_tokens, row], contiguous, on any device
    block_ids  the sequence's block table from token 0 on

    Raises InvalidParameter when the table is too short or names a block that `kv` has not."""
    num_blocks, num_layers, num_planes, num_heads, block_tokens, _ = kv.shape
    end_token = first_token + num_tokens
    first_block, end_block = first_token // block_tokens, -(-end_token // block_tokens)
    if first_token < 0 or num_tokens < 1 or end_block > len(block_ids):
        raise InvalidParameter(f"holds {len(block_ids)} blocks, too few for {end_token} tokens", field="block_ids")
    used = list(block_ids[first_block:end_block])
    if min(used) < 0 or max(used) >= num_blocks:
        raise InvalidParameter(f"names a block outside [0, {num_blocks})", field="block_ids")

    index = torch.tensor(used, dtype=torch.int64, device=kv.device)
    rows = kv.view(torch.uint8).view(num_blocks, num_layers * num_planes, num_heads, block_tokens, -1)
    skip, row_bytes = first_token - first_block * block_tokens, rows.shape[-1]
    planes = max(1, _STAGE_BYTES // (num_heads * len(used) * block_tokens * row_bytes))  # of layer · planes + plane
    hasher = xxhash.xxh3_128()
    for plane in range(0, num_layers * num_planes, planes):
        gathered = rows[:, plane : plane + planes].index_select(0, index)  # [blocks, planes, heads, slots, row_bytes]
        tokens = gathered.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, skip : skip + num_tokens]
        hasher.update(tokens.contiguous().cpu().numpy().data)
    return hasher.digest()
