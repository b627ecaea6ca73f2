"""The two kinds of attention, over the paged KV memory of a rank. Both return partial sums where heads are cut."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.groups import Groups
from engine.kv_memory import KVMemory
from engine.projection import Projection, Segments
from engine.step import StepTensors
from engine.weights import AttentionWeights, LatentWeights
from kernels.head_linear import head_linear
from kernels.linear import linear
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.rope_kv_write import rope_kv_write
from spec.model import LayerSpec, ModelSpec
from spec.shard import heads_of, split

Tables = tuple[Tensor, Tensor]  # cos, sin of one RopeSpec


def grouped_queries(
    normed: Tensor,
    weights: AttentionWeights,
    spec: ModelSpec,
    kv: KVMemory,
    index: int,
    tables: Tables,
    step: StepTensors,
    num_heads: int,
) -> Tensor:
    """Writes keys and values of the step's rows into layer `index` of the rank; returns the queries, [T, Hq, D]."""
    key_blocks, value_blocks = kv.layer(index)
    return rope_kv_write(
        weights.qkv(normed, step.adapters),
        *tables,
        step.positions,
        step.slots,
        key_blocks,
        value_blocks,
        num_heads,
        query_norm=weights.query_norm,
        key_norm=weights.key_norm,
        norm_eps=spec.rms_norm_eps,
        norm_offset=spec.norm_offset,
    )


def grouped_output(
    queries: Tensor,
    weights: AttentionWeights,
    spec: ModelSpec,
    layer: LayerSpec,
    kv: KVMemory,
    index: int,
    step: StepTensors,
    rows: Tensor | None,
    groups: Groups,
) -> Tensor:
    """[T, Hq, D] -> [T or rows, hidden]; `rows`: the rows that are still wanted."""
    key_blocks, value_blocks = kv.layer(index)
    attended = paged_attention(
        queries,
        key_blocks,
        value_blocks,
        step.block_tables,
        step.query_starts,
        step.context_lens,
        spec.attention_scale,
        window=layer.window,
        softcap=spec.attention_softcap,
        sinks=weights.sinks,
    )
    if rows is None:
        return _output(attended, weights.output, spec, groups, step.adapters)
    return _output(attended[rows], weights.output, spec, groups, step.wanted_adapters)


def latent_queries(
    normed: Tensor, weights: LatentWeights, spec: ModelSpec, kv: KVMemory, index: int, tables: Tables, step: StepTensors
) -> Tensor:
    """Multi-head latent attention in absorbed form (DeepSeek-V2, arXiv:2405.04434, section 2.1): a head's query times
    its key projection is a query over the latent itself, so that all heads attend to one cached row.

    Writes that row; returns the queries over it, [T, Hq, kv_rank + rope_dim]."""
    latent = spec.latent
    assert latent is not None
    num_rows, num_heads = normed.shape[0], weights.key_up.weight.shape[0]
    row_dim = latent.kv_rank + latent.rope_dim
    down = linear(normed, weights.down)
    first, row = torch.split(down, [down.shape[1] - row_dim, row_dim], dim=1)
    if weights.query_up is not None:
        assert weights.query_norm is not None
        first = linear(rms_norm(first.contiguous(), weights.query_norm, spec.rms_norm_eps)[0], weights.query_up)
    per_head = first.view(num_rows, num_heads, -1)
    plain, turned = torch.split(per_head, [latent.plain_dim, latent.rope_dim], dim=2)
    joined = normed.new_empty(num_rows, num_heads + 1, row_dim)
    head_linear(plain, weights.key_up, joined[:, :num_heads, : latent.kv_rank])
    joined[:, :num_heads, latent.kv_rank :] = turned
    joined[:, num_heads, : latent.kv_rank] = rms_norm(
        row[:, : latent.kv_rank].contiguous(), weights.norm, spec.rms_norm_eps
    )[0]
    joined[:, num_heads, latent.kv_rank :] = row[:, latent.kv_rank :]
    return rope_kv_write(
        joined.flatten(1),
        *tables,
        step.positions,
        step.slots,
        kv.layer(index)[0],
        None,
        num_heads,
        rotary_offset=latent.kv_rank,
    )


def latent_output(
    queries: Tensor,
    weights: LatentWeights,
    spec: ModelSpec,
    kv: KVMemory,
    index: int,
    step: StepTensors,
    rows: Tensor | None,
    groups: Groups,
) -> Tensor:
    """[T, Hq, kv_rank + rope_dim] -> [T or rows, hidden]"""
    row_blocks, latent_blocks = kv.layer(index)
    attended = paged_attention(
        queries,
        row_blocks,
        latent_blocks,
        step.block_tables,
        step.query_starts,
        step.context_lens,
        spec.attention_scale,
    )
    attended = attended if rows is None else attended[rows]
    value_up = weights.value_up
    per_head = attended.view(attended.shape[0], value_up.weight.shape[0], value_up.k)  # of no row, too
    return _output(head_linear(per_head, value_up).flatten(1), weights.output, spec, groups)


def _output(attended: Tensor, output: Projection, spec: ModelSpec, groups: Groups, segments: Segments = ()) -> Tensor:
    """[T, the rank's heads] -> [T, hidden]. A projection that is cut along hidden reads the heads of all ranks of the
    group, and has no part in what the others give."""
    num_rows, num_inputs = attended.shape
    if num_inputs == output.base.k:
        return output(attended, segments)
    out = attended.new_zeros(num_rows, spec.hidden_size)
    if num_rows:
        tp, head_dim = groups.shard.layout.tp, output.base.k // spec.num_heads
        widths = [len(heads_of(spec, tp, index)[0]) * head_dim for index in range(tp)]
        parts = groups.gather(attended.flatten(), [num_rows * width for width in widths])
        every = torch.cat([part.view(num_rows, -1) for part in parts], dim=1)
        own = split(spec.hidden_size, tp, groups.shard.index)
        out[:, own.start : own.stop] = output(every, segments)
    return out
