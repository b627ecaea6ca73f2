"""One decoder for every family that ModelSpec describes: pre-norm attention and gated MLP around a residual stream.

Nothing here depends on how many rows a step has or whose they are: with kernels that compute a row alone, a token's
hidden state is the same in any batch and for any cut of its prompt into chunks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from engine.kv_memory import KVMemory
from engine.rope import tables
from engine.weights import LayerWeights, ModelWeights
from kernels.gated_activation import gated_activation
from kernels.linear import embedding, linear
from kernels.paged_attention import paged_attention
from kernels.rms_norm import rms_norm
from kernels.rope_kv_write import rope_kv_write
from spec.model import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """The tokens of a step, T of S sequences one after the other, on the decoder's device."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, index in the sequence
    slots: Tensor  # [T] int64, block · block_tokens + offset, where the token's KV goes
    block_tables: Tensor  # [S, M] int32, padded on the right
    query_starts: Tensor  # [S + 1] int32, rising from 0 to T
    context_lens: Tensor  # [S] int32, tokens in the KV memory including this step's
    wanted_rows: Tensor | None  # [W] int64, rows whose hidden state is asked for; None: all of them, in order


class Decoder:
    def __init__(self, spec: ModelSpec, weights: ModelWeights, kv: KVMemory, device: torch.device) -> None:
        self.spec, self.weights, self.kv = spec, weights, kv
        cos, sin = tables(spec.rope, spec.head_dim, spec.max_context_tokens)
        self._cos, self._sin = cos.to(device), sin.to(device)
        self._scale = spec.head_dim**-0.5

    def forward(self, step: StepTensors, on_layer: Callable[[int], None] | None = None) -> Tensor:
        """Final hidden states of the wanted rows, [W, hidden], normed; the KV of every row is written on the way.

        `on_layer(i)` is called when the write of layer i's KV is issued: done on the CPU, on a GPU queued on the
        current stream.
        """
        eps, layers = self.spec.rms_norm_eps, self.weights.layers
        hidden = embedding(step.token_ids, self.weights.embedding)
        normed, stream = rms_norm(hidden, layers[0].attention_norm, eps)
        for index, layer in enumerate(layers):
            queries = self._queries(normed, layer, index, step)
            if on_layer is not None:
                on_layer(index)
            attended = self._attention(queries, index, step)
            last = index + 1 == len(layers)
            if last and step.wanted_rows is not None:  # nothing reads the other rows any more
                attended, stream = attended[step.wanted_rows], stream[step.wanted_rows]
            output = linear(attended, layer.attention_output)
            normed, stream = rms_norm(output, layer.mlp_norm, eps, stream)
            output = linear(gated_activation(linear(normed, layer.gate_up), "silu"), layer.down)
            next_norm = self.weights.final_norm if last else layers[index + 1].attention_norm
            normed, stream = rms_norm(output, next_norm, eps, stream)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[W, hidden] -> [W, vocab] float32."""
        return linear(hidden, self.weights.head, wide=True)

    def _queries(self, normed: Tensor, layer: LayerWeights, index: int, step: StepTensors) -> Tensor:
        """[T, hidden] -> [T, num_heads, head_dim]; writes the keys and values of these rows."""
        qkv, (key_blocks, value_blocks) = linear(normed, layer.qkv), self.kv.layer(index)
        return rope_kv_write(
            qkv, self._cos, self._sin, step.positions, step.slots, key_blocks, value_blocks, self.spec.num_heads
        )

    def _attention(self, queries: Tensor, index: int, step: StepTensors) -> Tensor:
        """[T, num_heads, head_dim] -> [T, num_heads · head_dim]"""
        key_blocks, value_blocks = self.kv.layer(index)
        return paged_attention(
            queries, key_blocks, value_blocks, step.block_tables, step.query_starts, step.context_lens, self._scale
        )
