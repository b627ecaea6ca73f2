"""One decoder for every family that ModelSpec describes: attention and feed-forward parts around a residual stream.

Nothing here depends on how many rows a step has or whose they are: with kernels that compute a row alone, a token's
hidden state is the same in any batch and for any cut of its prompt into chunks. Nor is there a rank in it: what it
holds was cut by the sharding table, and the sums over the cuts are `groups`'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from engine import attention
from engine.batch_sharding import PROMPT_ROWS_AT_ONCE, GroupRows, StageStep
from engine.cpu_program import record
from engine.feed_forward import Experts, batch_sharded, dense, gathers, weight_gathered
from engine.groups import Groups
from engine.kv_memory import KVMemory
from engine.layer_hook import LayerHook
from engine.projection import Segments
from engine.rope import tables
from engine.step import StepTensors
from engine.weights import LatentWeights, LayerWeights, MlpWeights, ModelWeights, MoeWeights
from kernels.linear import embedding, linear
from kernels.moe_mlp import PackedExperts
from kernels.rms_norm import rms_norm
from spec.model import ModelSpec
from spec.shard import RankShard, Replicas, split


class Decoder:
    """The layers of one rank."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: RankShard,
        weights: ModelWeights,
        kv: KVMemory,
        groups: Groups,
        device: torch.device,
        dtype: torch.dtype,
        replicas: Replicas | None = None,
    ) -> None:
        self.spec, self.shard, self.weights, self.kv, self.groups = spec, shard, weights, kv, groups
        self._device, self.dtype = device, dtype
        made = [tables(rope, spec.rotary_dim, spec.max_context_tokens) for rope in spec.ropes]
        self.rope_tables = [(cos.to(device), sin.to(device)) for cos, sin in made]
        self.experts = Experts(spec, shard, groups, device, replicas) if spec.moe is not None else None
        self.recorded = record(self)
        self._embedding_scale = float(torch.tensor(spec.embedding_scale, dtype=dtype))

    def forward(
        self,
        step: StepTensors,
        hook: LayerHook | None = None,
        meanwhile: Callable[[], None] = lambda: None,
        stage: StageStep | None = None,
    ) -> Tensor | None:
        """In the last stage the final hidden states of the wanted rows, [W, hidden], normed; None in the others, whose
        rows have gone on to the next. The KV of every row is written on the way.

        The hook is called when a write is issued: done on the CPU, on a GPU queued on the current stream;
        `meanwhile()` once: before the layers, which on the CPU this thread computes; on a GPU when they are queued.
        `stage`: where the groups of the stage share each MLP.
        """
        first = self.shard.is_first_stage
        stream = self.embed(step.token_ids, stage) if first else self._received(step)
        on_cpu = self._device.type == "cpu"
        if on_cpu:
            meanwhile()
        rows = self.compute(stream, step, hook, stage)
        if not self.shard.is_last_stage:
            self.groups.send(rows.clone() if self.recorded is not None else rows)  # the next step writes over them
        if not on_cpu:
            meanwhile()
        return rows if self.shard.is_last_stage else None

    def compute(
        self, stream: Tensor, step: StepTensors, hook: LayerHook | None = None, stage: StageStep | None = None
    ) -> Tensor:
        """The layers alone: [T, hidden] of the residual stream, as it comes to this stage, -> what leaves it; of the
        last stage the final hidden states of the wanted rows, normed."""
        layers = self.weights.layers
        if self.recorded is not None and not step.adapters:
            return self.recorded.run(stream, step, hook)
        normed = self._norm(stream, layers[0].attention_norm)
        for index, layer in enumerate(layers):
            rows = step.wanted_rows if self.shard.is_last_stage and index + 1 == len(layers) else None
            output = self.groups.sum(self._attend(normed, layer, index, step, rows, hook))
            if rows is not None:  # nothing reads the other rows any more
                stream = stream[rows]
            normed, stream = self._join(output, layer.attention_post_norm, layer.mlp_norm, stream)
            segments = step.adapters if rows is None else step.wanted_adapters
            assert rows is None or step.live is None
            of_groups = self._rows_of_groups(index, stage)
            output = self._feed_forward(normed, layer, index, segments, of_groups, step.live)
            following = layers[index + 1].attention_norm if index + 1 < len(layers) else self.weights.final_norm
            normed, stream = self._join(output, layer.mlp_post_norm, following, stream)
        return normed if self.shard.is_last_stage else stream

    def place_kv(self, kv: KVMemory) -> None:
        """Between two steps; nothing of the KV memory before is kept."""
        self.kv = kv
        self.recorded = record(self)

    def place_experts(self, shard: RankShard, replicas: Replicas, load: Callable[[int], PackedExperts]) -> None:
        """Between two steps: `load(layer)` brings the experts that `shard` has in a layer of the model, for those in
        which they are others than before. Of one layer at a time both are there."""
        assert self.experts is not None
        layers = list(self.weights.layers)
        for index, layer in enumerate(layers):
            if isinstance(layer.mlp, MoeWeights) and shard.experts[index] != self.shard.experts[index]:
                mlp = dataclasses.replace(layer.mlp, experts=load(shard.layers[index]))
                layers[index] = dataclasses.replace(layer, mlp=mlp)
                self.weights = dataclasses.replace(self.weights, layers=tuple(layers))
        self.shard = shard
        self.experts.place(shard, replicas)

    def follow(self, stage: StageStep | None = None) -> None:
        """A step in which this rank's group has no row, and other groups may have some for the weights here."""
        if stage is None and (self.experts is None or self.shard.layout.dp == 1):
            return
        nothing = torch.empty(0, self.spec.hidden_size, dtype=self.dtype, device=self._device)
        if stage is not None and self.shard.is_first_stage:
            self.embed(torch.empty(0, dtype=torch.int64, device=self._device), stage)
        for index, layer in enumerate(self.weights.layers):
            if stage is not None or isinstance(layer.mlp, MoeWeights):
                self._feed_forward(nothing, layer, index, (), self._rows_of_groups(index, stage))
        if stage is not None and self.shard.is_last_stage:
            for _ in self.heads(nothing, 0, stage):
                pass

    def heads(self, hidden: Tensor, num_drawn: int, stage: StageStep | None = None) -> Iterator[Tensor]:
        """The logits of the wanted rows `hidden`, [n, the rank's vocabulary] float32 each: first of the `num_drawn`
        that draw, then of the others in runs of a few. A caller takes all: other ranks wait for this one's part."""
        if stage is None:
            yield self.logits(hidden[:num_drawn]) if num_drawn else hidden
            for start in range(num_drawn, hidden.shape[0], PROMPT_ROWS_AT_ONCE):
                yield self.logits(hidden[start : start + PROMPT_ROWS_AT_ONCE])
            return
        layout, start = self.shard.layout, 0
        parts = [layout.dense_part(group, self.shard.index) for group in range(layout.dp)]
        widths = [len(split(self.spec.vocab_size, layout.dense_tp, part)) for part in parts]
        for counts in stage.head_counts():
            own = hidden[start : start + counts[self.shard.group]]
            start += own.shape[0]
            if any(counts):
                own = self.groups.exchange_columns(self.logits(self.groups.gather_rows(own, counts)), counts, widths)
            yield own

    def logits(self, hidden: Tensor) -> Tensor:
        """[W, hidden] -> [W, the vocabulary that the rank holds] float32."""
        assert self.weights.head is not None
        found = linear(hidden, self.weights.head, wide=True)
        softcap = self.spec.logits_softcap
        return found if softcap is None else torch.tanh(found / softcap) * softcap

    def embed(self, token_ids: Tensor, stage: StageStep | None = None) -> Tensor:
        """[T] -> [T, hidden], of the first stage."""
        assert self.weights.embedding is not None
        own = self.shard.held_vocab
        if stage is not None:
            token_ids = self.groups.gather_rows(token_ids, stage.rows.counts)
        here = (token_ids - own.start).clamp(0, len(own) - 1) if len(own) < self.spec.vocab_size else token_ids
        hidden = embedding(here, self.weights.embedding)
        if len(own) < self.spec.vocab_size:
            elsewhere = (token_ids < own.start) | (token_ids >= own.stop)
            hidden = hidden.masked_fill_(elsewhere[:, None], 0.0)
            if stage is not None:
                hidden = self.groups.scatter_rows(hidden, stage.rows.counts)
            hidden = self.groups.sum(hidden)
        return hidden if self._embedding_scale == 1.0 else hidden * self._embedding_scale

    def _received(self, step: StepTensors) -> Tensor:
        stream = torch.empty(step.positions.shape[0], self.spec.hidden_size, dtype=self.dtype, device=self._device)
        return self.groups.receive(stream)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.spec.rms_norm_eps, offset=self.spec.norm_offset)[0]

    def _join(
        self, output: Tensor, post_norm: Tensor | None, norm: Tensor | None, stream: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(what the next part reads, the stream with `output` in it); the first is empty after a stage's last layer."""
        if post_norm is not None:
            output = self._norm(output, post_norm)
        if norm is None:
            return output, stream + output
        return rms_norm(output, norm, self.spec.rms_norm_eps, stream, offset=self.spec.norm_offset)

    def _attend(
        self,
        normed: Tensor,
        layer: LayerWeights,
        index: int,
        step: StepTensors,
        rows: Tensor | None,
        hook: LayerHook | None,
    ) -> Tensor:
        weights, described = layer.attention, self.spec.layers[self.shard.layers[index]]
        rope_tables = self.rope_tables[described.rope]
        if isinstance(weights, LatentWeights):
            queries = attention.latent_queries(normed, weights, self.spec, self.kv, index, rope_tables, step)
            _told(hook, index + 1)
            return attention.latent_output(queries, weights, self.spec, self.kv, index, step, rows, self.groups)
        num_heads = len(self.shard.heads)
        queries = attention.grouped_queries(normed, weights, self.spec, self.kv, index, rope_tables, step, num_heads)
        _told(hook, index + 1)
        return attention.grouped_output(queries, weights, self.spec, described, self.kv, index, step, rows, self.groups)

    def _rows_of_groups(self, index: int, stage: StageStep | None) -> GroupRows | None:
        """In the feed-forward part of layer `index`: behind the last attention only the wanted rows go on."""
        if stage is None:
            return None
        is_last = self.shard.is_last_stage and index + 1 == len(self.weights.layers)
        return stage.wanted if is_last else stage.rows

    def _feed_forward(
        self,
        normed: Tensor,
        layer: LayerWeights,
        index: int,
        segments: Segments,
        rows: GroupRows | None,
        live: Tensor | None = None,
    ) -> Tensor:
        if isinstance(layer.mlp, MlpWeights):
            if rows is not None:
                return self.groups.sum(batch_sharded(normed, layer.mlp, self.spec.activation, rows, self.groups))
            if gathers(self.shard, normed.shape[0]) and not segments:
                return weight_gathered(normed, layer.mlp, self.spec.activation, self.groups)
            return self.groups.sum(dense(normed, layer.mlp, self.spec.activation, segments))
        assert self.experts is not None
        return self.experts.forward(normed, layer.mlp, index, rows, live)


def _told(hook: LayerHook | None, end: int) -> None:
    if hook is not None and end in hook.ends:
        hook.written(end)
