"""Causal attention over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180), grouped-query (Ainslie et al. 2023).

    out[query, head] = Σ_n softmax_n(scale · q · k[n]) v[n],    n over positions [0, position of the query]

Query j of sequence s sits at position context_lens[s] - (query_starts[s + 1] - query_starts[s]) + j; head i reads KV
head i // (Hq / Hkv); position n of a sequence is in block block_tables[s, n // block_tokens] at n % block_tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_tokens = key_blocks.shape[1:3]
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    out = torch.empty(q.shape[0], num_heads, head_dim, dtype=q.dtype, device=q.device)

    def gather(blocks: Tensor, table: Tensor, context: int) -> Tensor:
        """[Hkv, 1, context, D]"""
        return blocks[table].transpose(0, 1).flatten(1, 2)[:, None, :context].float()

    for s, context in enumerate(contexts):
        table = block_tables[s, : -(-context // block_tokens)].long()
        queries = q[starts[s] : starts[s + 1]]
        num_queries = queries.shape[0]
        grouped = queries.float().transpose(0, 1).reshape(num_kv_heads, -1, num_queries, head_dim)
        scores = grouped @ gather(key_blocks, table, context).transpose(-1, -2) * scale
        hidden = torch.ones(num_queries, context, dtype=torch.bool, device=q.device).triu(context - num_queries + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        attended = (weights @ gather(value_blocks, table, context)).reshape(num_heads, num_queries, head_dim)
        out[starts[s] : starts[s + 1]] = attended.transpose(0, 1).to(q.dtype)
    return out.flatten(1)


def paged_attention(
    q: Tensor,
    key_blocks: Tensor,
    value_blocks: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Tensor:
    """Returns [T, Hq * D] in q.dtype. Chunks and decodes may be mixed.

    q                         [T, Hq, D], contiguous; the queries of all sequences, one after the other
    key_blocks, value_blocks  [num_blocks, Hkv, block_tokens, D], strided views of the KV memory; D is dense
    block_tables              [S, M] int32; entries past a sequence's last block are not read
    query_starts              [S + 1] int32, rising from 0 to T
    context_lens              [S] int32, tokens in the KV memory including this step's; at least the number of queries
    """
    assert key_blocks.shape == value_blocks.shape
    assert key_blocks.stride(3) == value_blocks.stride(3) == 1
    return reference(q, key_blocks, value_blocks, block_tables, query_starts, context_lens, scale)
