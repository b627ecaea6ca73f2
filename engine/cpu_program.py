"""A rank's layers recorded as a program of CPU kernels (kernels/cpu/program.py), in the order of Decoder.forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from engine.layer_hook import LayerHook
from engine.projection import Projection
from engine.step import StepTensors
from engine.weights import AttentionWeights, LayerWeights, MlpWeights
from kernels.cpu.program import Program

if TYPE_CHECKING:
    from engine.decoder import Decoder


def record(decoder: Decoder) -> RecordedLayers | None:
    """None where the decoder needs more than one rank's own dense layers, rounds rows, or has no compiled kernels."""
    layout, layers = decoder.shard.layout, decoder.weights.layers
    if layout.dense_tp > 1 or not all(isinstance(layer.mlp, MlpWeights) for layer in layers):
        return None
    if not all(isinstance(layer.attention, AttentionWeights) for layer in layers):
        return None
    attention = layers[0].attention
    assert isinstance(attention, AttentionWeights)
    if any(projection.base.activations != "kept" for layer in layers for projection in _projections(layer)):
        return None
    library = attention.qkv.base.library
    if library is None or not library.covers(decoder.dtype, decoder.kv.tensor.dtype):
        return None
    return RecordedLayers(decoder, Program(library, decoder.dtype))


def _projections(layer: LayerWeights) -> tuple[Projection, ...]:
    assert isinstance(layer.attention, AttentionWeights)
    assert isinstance(layer.mlp, MlpWeights)
    return layer.attention.qkv, layer.attention.output, layer.mlp.gate_up, layer.mlp.down


class RecordedLayers:
    """Buffers by name, then the layers one after the other."""

    def __init__(self, decoder: Decoder, program: Program) -> None:
        self._decoder, self.program = decoder, program
        spec, first = decoder.spec, decoder.weights.layers[0]
        assert isinstance(first.attention, AttentionWeights)
        hidden, attended = spec.hidden_size, first.attention.output.base.k
        self._stream = program.buffer(hidden)  # buffer 0: what the step begins with
        self._normed, self._output, self._post = (program.buffer(hidden) for _ in range(3))
        self._qkv, self._queries = program.buffer(first.attention.qkv.base.n), program.buffer(attended)
        self._attended = program.buffer(attended)
        inner = max(layer.mlp.down.base.k for layer in decoder.weights.layers if isinstance(layer.mlp, MlpWeights))
        self._gate_up, self._inner = program.buffer(2 * inner), program.buffer(inner)
        self._kept_stream, self._kept_attended = program.buffer(hidden), program.buffer(attended)
        self._written: list[int] = []  # operations up to and with the one that writes a layer's KV
        program.rms_norm(self._stream, first.attention_norm, spec.rms_norm_eps, self._normed, offset=spec.norm_offset)
        for index, layer in enumerate(decoder.weights.layers):
            self._layer(index, layer)
        self._result = self._normed if decoder.shard.is_last_stage else self._stream

    def _layer(self, index: int, layer: LayerWeights) -> None:
        decoder, spec = self._decoder, self._decoder.spec
        assert isinstance(layer.mlp, MlpWeights)
        self._attention(index, layer)
        if decoder.shard.is_last_stage and index + 1 == len(decoder.weights.layers):
            self.program.wanted_rows(self._attended, self._kept_attended)
            self.program.wanted_rows(self._stream, self._kept_stream)
            self._attended, self._stream = self._kept_attended, self._kept_stream
        assert isinstance(layer.attention, AttentionWeights)
        self.program.linear(self._attended, layer.attention.output.base, self._output)
        self._join(layer.attention_post_norm, layer.mlp_norm)
        self.program.linear(self._normed, layer.mlp.gate_up.base, self._gate_up)
        self.program.gated_activation(self._gate_up, spec.activation, self._inner)
        self.program.linear(self._inner, layer.mlp.down.base, self._output)
        layers = decoder.weights.layers
        following = layers[index + 1].attention_norm if index + 1 < len(layers) else decoder.weights.final_norm
        self._join(layer.mlp_post_norm, following)

    def _attention(self, index: int, layer: LayerWeights) -> None:
        decoder, spec, weights = self._decoder, self._decoder.spec, layer.attention
        assert isinstance(weights, AttentionWeights)
        described = spec.layers[decoder.shard.layers[index]]
        cos, sin = decoder.rope_tables[described.rope]
        key_blocks, value_blocks = decoder.kv.layer(index)
        num_heads = len(decoder.shard.heads)
        self.program.linear(self._normed, weights.qkv.base, self._qkv)
        self.program.rope_kv_write(
            self._qkv,
            cos,
            sin,
            key_blocks,
            value_blocks,
            num_heads,
            self._queries,
            query_norm=weights.query_norm,
            key_norm=weights.key_norm,
            norm_eps=spec.rms_norm_eps,
            norm_offset=spec.norm_offset,
        )
        self._written.append(self.program.length)
        self.program.paged_attention(
            self._queries,
            key_blocks,
            value_blocks,
            num_heads,
            spec.attention_scale,
            self._attended,
            window=described.window,
            softcap=spec.attention_softcap,
            sinks=weights.sinks,
        )

    def _join(self, post_norm: Tensor | None, norm: Tensor | None) -> None:
        """What the last operation gave joins the stream, which is then normed for the next one. After the last layer of
        a stage that is not the last nothing reads what is normed, and any weight does."""
        spec, source = self._decoder.spec, self._output
        if post_norm is not None:
            self.program.rms_norm(source, post_norm, spec.rms_norm_eps, self._post, offset=spec.norm_offset)
            source = self._post
        weight = norm if norm is not None else self._decoder.weights.layers[0].attention_norm
        self.program.rms_norm(
            source, weight, spec.rms_norm_eps, self._normed, stream=self._stream, offset=spec.norm_offset
        )

    def run(self, stream: Tensor, step: StepTensors, hook: LayerHook | None = None) -> Tensor:
        """stream: [T, hidden]. Returns the normed rows that are wanted, in a stage that is not the last the stream; a
        view that the next step writes over."""
        return self.program.run(
            stream,
            step.positions,
            step.slots,
            step.block_tables,
            step.query_starts,
            step.context_lens,
            step.wanted_rows if self._decoder.shard.is_last_stage else None,
            self._result,
            self._pauses(hook),
        )

    def _pauses(self, hook: LayerHook | None) -> list[tuple[int, Callable[[], None]]]:
        if hook is None:
            return []
        return [(self._written[end - 1], functools.partial(hook.written, end)) for end in hook.ends]
