"""Causal attention over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180), grouped-query (Ainslie et al. 2023).

    out[query, head] = Σ_n softmax_n(score[n]) v[n],    n over positions [0, position of the query]
    score = scale · q · k[n], or softcap · tanh(that / softcap)

where a window hides the positions before the last `window`, and a sink is one more term of the softmax that brings no
value. Query j of sequence s sits at position context_lens[s] - (query_starts[s + 1] - query_starts[s]) + j; head i
reads KV head i // (Hq / Hkv); position n of a sequence is in block block_tables[s, n // block_tokens] at
n % block_tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.cpu.library import library_for
from kernels.kv_rows import LARGEST_CODE, dequantise_rows, row_dims
from kernels.paged_attention_gpu import launch


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
