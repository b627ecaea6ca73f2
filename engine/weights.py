"""Weights from files to what the decoder reads: a rank's part of each, projections fused and packed.

Each source is freed before the next one is read.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from engine.adapters import AdapterFiles
from engine.families import FAMILIES, Moe, Weight
from engine.model_base import ModelFiles
from engine.projection import Projection
from engine.sharding import Cutter
from kernels.head_linear import PackedHeads, pack_heads
from kernels.linear import PackedLinear, pack, pack_quantised
from kernels.moe_mlp import PackedExperts, join_experts
from kernels.quantised import Kind, QuantisedWeight, alike, concatenate, dequantise, quantise
from spec.model import LatentSpec
from spec.shard import RankShard

Part = Tensor | QuantisedWeight  # [rows, columns], both taking a tensor of row numbers as an index
Quantisation = Literal["auto", "none", "int8", "int4", "fp8"]
Rounding = Literal["kept", "stored"]  # of the rows that quantised weights multiply
INT4_GROUP = 32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights:
    """Hq and Hkv are the rank's."""

    qkv: Projection  # [(Hq + 2 · Hkv) · head_dim, hidden]
    output: Projection  # [hidden, Hq · head_dim], or see Cutter.along_hidden
    query_norm: Tensor | None  # [head_dim]
    key_norm: Tensor | None  # [head_dim]
    sinks: Tensor | None  # [Hq] float32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LatentWeights:
    """Multi-head latent attention in absorbed form. The rotated dimensions are in rotate-half order."""

    down: PackedLinear  # [queries or their rank, then kv_rank + rope_dim; hidden]
    query_norm: Tensor | None  # [query_rank]
    query_up: PackedLinear | None  # [Hq · (plain_dim + rope_dim), query_rank]; None: `down` gives the queries
    norm: Tensor  # [kv_rank]
    key_up: PackedHeads  # [Hq, kv_rank, plain_dim]
    value_up: PackedHeads  # [Hq, value_dim, kv_rank]
    output: Projection  # [hidden, Hq · value_dim], or see Cutter.along_hidden


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MlpWeights:
    gate_up: Projection  # [2 · the rank's intermediate, hidden]
    down: Projection  # [hidden, the rank's intermediate]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class MoeWeights:
    router: PackedLinear  # [num_experts, hidden] float32
    selection_bias: Tensor | None  # [num_experts] float32
    experts: PackedExperts  # the resident ones, in the order of RankShard.experts
    shared: MlpWeights | None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    attention_norm: Tensor  # [hidden]
    attention: AttentionWeights | LatentWeights
    attention_post_norm: Tensor | None  # [hidden]
    mlp_norm: Tensor  # [hidden]
    mlp: MlpWeights | MoeWeights
    mlp_post_norm: Tensor | None  # [hidden]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ModelWeights:
    """Of one rank: `embedding` of the first stage, `final_norm` and `head` of the last."""

    embedding: PackedLinear | None  # [the rank's vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor | None  # [hidden]
    head: PackedLinear | None  # [the rank's vocabulary, hidden]; the embedding itself where they are tied


def load_weights(
    files: ModelFiles,
    shard: RankShard,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
    adapters: Mapping[str, AdapterFiles] | None = None,
    quantisation: Quantisation = "auto",
    activations: Rounding = "kept",
) -> ModelWeights:
    """Reads each tensor once. `quantisation` "auto": as they are stored; "none": none; else what is not stored so is
    brought into it. `activations` "stored": a weight that stays as it is stored rounds the rows that it multiplies to
    FP8, where the files say that it is meant so; "kept": none does. `progress` hears the fraction done, rising from
    above 0 to 1.

    Peak memory above the packed weights is about twice the largest projection, or the experts of one layer. Raises what
    ModelFiles.tensor does.
    """
    loader = _Loader(files, shard, dtype, device, adapters or {}, quantisation, activations)
    family = FAMILIES[files.spec.family]
    total, done = len(shard.layers) + 2, 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / total)

    embedding = loader.linear((family.embedding,)) if shard.is_first_stage else None
    advance()
    layers = []
    for index in shard.layers:
        layers.append(loader.layer(index))
        advance()
    final_norm = head = None
    if shard.is_last_stage:
        final_norm = loader.vector(family.final_norm)
        tied = files.spec.tie_embeddings
        head = embedding if tied and embedding else loader.linear((family.embedding if tied else family.head,))
    advance()
    _trim()
    return ModelWeights(embedding, tuple(layers), final_norm, head)


def load_experts(
    files: ModelFiles,
    shard: RankShard,
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    quantisation: Quantisation,
    activations: Rounding,
) -> PackedExperts:
    """Those of the rank's in one layer, as load_weights() reads them."""
    return _Loader(files, shard, dtype, device, {}, quantisation, activations).experts(layer)


class _Loader:
    def __init__(
        self,
        files: ModelFiles,
        shard: RankShard,
        dtype: torch.dtype,
        device: torch.device,
        adapters: Mapping[str, AdapterFiles],
        quantisation: Quantisation,
        activations: Rounding,
    ) -> None:
        self._files, self._shard, self._dtype, self._device, self._adapters = files, shard, dtype, device, adapters
        self._quantisation, self._activations = quantisation, activations
        self._spec, self._family = files.spec, FAMILIES[files.spec.family]
        self._cutter = Cutter(files.spec, shard)

    # ---- single tensors ----------------------------------------------------------------------------------------------

    def matrix(self, weight: Weight, layer: int = 0, expert: int = 0) -> Tensor:
        """The rank's part, in the dtype of computation; may lie in the mapping of its file still."""
        stored = self._files.tensor(weight.tensor_name(layer, expert))
        return self._cutter.cut(stored, weight.shape).to(self._dtype)

    def part(self, weight: Weight, layer: int = 0, expert: int = 0) -> Part:
        """As `matrix`, or quantised where it is stored so and wanted so, or is to become so. The whole weight is
        quantised and then cut: every layout holds the same numbers."""
        name = weight.tensor_name(layer, expert)
        if self._quantisation == "auto" and (stored := self._files.quantised(name)) is not None:
            stored = stored if self._activations == "stored" else dataclasses.replace(stored, activations="kept")
            return self._cutter.cut_quantised(stored, weight.shape)
        if (kind := self._kind_of(weight)) is not None:
            return self._cutter.cut_quantised(_quantised(self._files.tensor(name), kind), weight.shape)
        return self.matrix(weight, layer, expert)

    def _kind_of(self, weight: Weight) -> Kind | None:
        """What a plain weight is brought into as it is loaded."""
        if self._quantisation not in ("int8", "int4", "fp8"):
            return None
        if self._quantisation == "int4" and weight.shape[0] == "vocab":  # rare tokens would suffer first
            return "int8"
        return self._quantisation

    def _within(self, down: Weight, layer: int, expert: int = 0) -> _Loader:
        """What loads the MLP that `down` is of: its channels in the order in which `down` has whole groups of them."""
        order = self._order(down, layer, expert)
        return self if order is None else self._with(self._cutter.in_order(down.shape[1], order))

    def _for_output(self, layer: int) -> _Loader:
        """What loads the output projection of attention."""
        cut_heads = self._shard.layout.tp > 1 and self._order(self._family.output, layer) is not None
        return self._with(self._cutter.along_hidden()) if cut_heads else self

    def _order(self, weight: Weight, layer: int, expert: int = 0) -> Tensor | None:
        return self._files.order(weight.tensor_name(layer, expert)) if self._quantisation == "auto" else None

    def _with(self, cutter: Cutter) -> _Loader:
        found = copy.copy(self)
        found._cutter = cutter
        return found

    def vector(self, weight: Weight, layer: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        stored = self._files.tensor(weight.tensor_name(layer))
        return self._cutter.cut(stored, weight.shape).to(self._device, dtype or self._dtype, copy=True)

    def _optional(self, weight: Weight | None, layer: int, dtype: torch.dtype | None = None) -> Tensor | None:
        return None if weight is None else self.vector(weight, layer, dtype)

    def bias(self, weight: Weight, layer: int = 0, expert: int = 0) -> Tensor | None:
        if not weight.has_bias(self._spec):
            return None
        words = (weight.shape[0], weight.shape[2]) if len(weight.shape) == 3 else weight.shape[:1]
        found = self._cutter.cut(self._files.tensor(weight.bias_name(layer, expert)), words).to(self._dtype)
        return found if self._cutter.owns_bias(weight) else torch.zeros_like(found)

    def linear(self, weights: Sequence[Weight], layer: int = 0) -> PackedLinear:
        """The weights one after the other along their rows."""
        biases = [bias for weight in weights if (bias := self.bias(weight, layer)) is not None]
        bias = _fused(biases, self._device) if biases else None
        return self.packed([self.part(weight, layer) for weight in weights], bias)

    def packed(self, parts: list[Part], bias: Tensor | None = None) -> PackedLinear:
        """One after the other along their rows, `parts` being emptied; quantised where they are so, and all alike."""
        stored = [part for part in parts if isinstance(part, QuantisedWeight)]
        if len(stored) == len(parts) and alike(stored):
            return pack_quantised(concatenate(stored).to(self._device), self._dtype, bias)
        for index, part in enumerate(parts):
            if isinstance(part, QuantisedWeight):
                parts[index] = dequantise(part).to(self._dtype)
        whole = _fused([part for part in parts if isinstance(part, Tensor)], self._device)
        return pack(whole, bias)

    def projection(self, weights: Sequence[Weight], layer: int) -> Projection:
        adapters = {}
        for name, files in self._adapters.items():
            pair = files.low_rank(weights, layer, self._cutter, self._dtype, self._device)
            if pair is not None:
                adapters[name] = pair
        return Projection(self.linear(weights, layer), adapters)

    # ---- parts of a layer --------------------------------------------------------------------------------------------

    def layer(self, index: int) -> LayerWeights:
        family, is_moe = self._family, self._spec.layers[index].is_moe
        return LayerWeights(
            attention_norm=self.vector(family.attention_norm, index),
            attention=self._attention(index) if self._spec.latent is None else self._latent(self._spec.latent, index),
            attention_post_norm=self._optional(family.attention_post_norm, index),
            mlp_norm=self.vector(family.mlp_norm, index),
            mlp=self._moe(index) if is_moe else self._mlp(family.gate_up, family.down, index),
            mlp_post_norm=self._optional(family.mlp_post_norm, index),
        )

    def _attention(self, index: int) -> AttentionWeights:
        family = self._family
        return AttentionWeights(
            qkv=self.projection(family.qkv, index),
            output=self._for_output(index).projection((family.output,), index),
            query_norm=self._optional(family.query_norm, index),
            key_norm=self._optional(family.key_norm, index),
            sinks=self._optional(family.sinks, index, torch.float32),
        )

    def _latent(self, latent: LatentSpec, index: int) -> LatentWeights:
        names = self._family.latent
        assert names is not None
        through_rank = latent.query_rank is not None
        queries = self.part(names.query_up if through_rank else names.query, index)
        queries = _halves(queries, latent.plain_dim + latent.rope_dim, latent.rope_dim)
        row = _halves(self.part(names.down, index), latent.kv_rank + latent.rope_dim, latent.rope_dim)
        first = self.part(names.query_down, index) if through_rank else queries
        up = self.matrix(names.up, index).to(self._device)
        per_head = up.view(-1, latent.plain_dim + latent.value_dim, latent.kv_rank)
        key_up, value_up = torch.split(per_head, [latent.plain_dim, latent.value_dim], dim=1)
        return LatentWeights(
            down=self.packed([first, row]),
            query_norm=self.vector(names.query_norm, index) if through_rank else None,
            query_up=self.packed([queries]) if through_rank else None,
            norm=self.vector(names.norm, index),
            key_up=pack_heads(key_up.transpose(1, 2)),
            value_up=pack_heads(value_up),
            output=Projection(self._for_output(index).linear((self._family.output,), index)),
        )

    def _mlp(self, gate_up: Sequence[Weight], down: Weight, index: int) -> MlpWeights:
        own = self._within(down, index)
        return MlpWeights(own.projection(gate_up, index), own.projection((down,), index))

    def _moe(self, index: int) -> MoeWeights:
        names, moe = self._family.moe, self._spec.moe
        assert names is not None and moe is not None
        router_bias = self.bias(names.router, index)
        shared = None
        if moe.shared_intermediate_size and names.shared_down is not None:
            own = self._within(names.shared_down, index)
            shared = MlpWeights(
                Projection(own.linear(names.shared_gate_up, index)), Projection(own.linear((names.shared_down,), index))
            )
        return MoeWeights(
            router=pack(
                self.vector(names.router, index, torch.float32),
                None if router_bias is None else router_bias.to(self._device, torch.float32),
            ),
            selection_bias=self._optional(names.selection_bias, index, torch.float32) if moe.selection_bias else None,
            experts=self.experts(index),
            shared=shared,
        )

    def experts(self, index: int) -> PackedExperts:
        names = self._family.moe
        assert names is not None
        return self._stacked_experts(names, index) if names.stacked else self._experts(names, index)

    def _experts(self, names: Moe, index: int) -> PackedExperts:
        gate_up, down = [], []
        for expert in self._shard.experts[index - self._shard.layers.start]:
            own = self._within(names.down, index, expert)
            gate_up.append(own.packed([own.part(part, index, expert) for part in names.gate_up]))
            down.append(own.packed([own.part(names.down, index, expert)]))
        return join_experts(gate_up, down)

    def _stacked_experts(self, names: Moe, index: int) -> PackedExperts:
        (pairs,) = names.gate_up
        pair_bias, down_bias = self.bias(pairs, index), self.bias(names.down, index)
        assert pair_bias is not None and down_bias is not None
        gate_up, down = [], []
        each_pair, each_down = self._stacked(pairs, index), self._stacked(names.down, index)
        for expert in self._shard.experts[index - self._shard.layers.start]:
            rows, bias = each_pair(expert), pair_bias[expert]
            sorted_bias = torch.cat((bias[::2], bias[1::2])).to(self._device)
            order = torch.arange(len(bias))
            gate_up.append(self.packed([rows[torch.cat((order[::2], order[1::2]))]], sorted_bias))
            down.append(self.packed([each_down(expert)], down_bias[expert].to(self._device)))
        return join_experts(gate_up, down)

    def _stacked(self, weight: Weight, index: int) -> Callable[[int], Part]:
        """expert -> the rank's part of its matrix, [out, in]."""
        name, words, kind = weight.tensor_name(index), (weight.shape[2], weight.shape[1]), self._kind_of(weight)
        if kind is not None:
            every = self._files.tensor(name)
            return lambda expert: self._cutter.cut_quantised(_quantised(every[expert].T, kind), words)
        if self._quantisation != "auto" or self._files.quantised(name, 0) is None:
            whole = self.matrix(weight, index)
            return lambda expert: whole[expert].T

        def one(expert: int) -> Part:
            stored = self._files.quantised(name, expert)
            assert stored is not None
            return self._cutter.cut_quantised(stored, words)

        return one


def _trim() -> None:
    """What was freed on the way goes back to the system: glibc would keep up to the largest projection."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _halves(rows: Part, head_rows: int, rotary_dim: int) -> Part:
    """[heads · head_rows, K]: the last `rotary_dim` rows of each head from pairs (x0, x1), (x2, x3), … into two halves
    (x0, x2, …, x1, x3, …). Queries and keys are sorted alike, so that their products stay."""
    num_rows = rows.n if isinstance(rows, QuantisedWeight) else rows.shape[0]
    heads = torch.arange(num_rows).view(-1, head_rows)
    plain, turned = torch.split(heads, [head_rows - rotary_dim, rotary_dim], dim=1)
    return rows[torch.cat((plain, turned[:, ::2], turned[:, 1::2]), dim=1).flatten()]


def _quantised(weight: Tensor, kind: Kind) -> QuantisedWeight:
    return quantise(weight, kind, INT4_GROUP if kind == "int4" else None)


def _fused(parts: list[Tensor], device: torch.device) -> Tensor:
    """One after the other along the rows. A lone part is copied too: it may still lie in the mapping of its file."""
    out = torch.empty(sum(part.shape[0] for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
    start = 0
    while parts:
        part = parts.pop(0)
        out[start : start + part.shape[0]] = part
        start += part.shape[0]
    return out
