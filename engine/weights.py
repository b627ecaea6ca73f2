"""Weights from files to what the decoder reads: projections fused and packed, each source freed before the next one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from engine.families import FAMILIES, Weight
from engine.model_base import ModelFiles
from kernels.linear import PackedLinear, pack


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LayerWeights:
    attention_norm: Tensor  # [hidden]
    qkv: PackedLinear  # [(num_heads + 2 · num_kv_heads) · head_dim, hidden]
    attention_output: PackedLinear  # [hidden, num_heads · head_dim]
    mlp_norm: Tensor  # [hidden]
    gate_up: PackedLinear  # [2 · intermediate, hidden]
    down: PackedLinear  # [hidden, intermediate]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class ModelWeights:
    embedding: PackedLinear  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor  # [hidden]
    head: PackedLinear  # [vocab, hidden]; the embedding itself where they are tied


def load_weights(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[float], None] | None = None,
) -> ModelWeights:
    """Reads each tensor once. `progress` hears the fraction done, rising from above 0 to 1.

    Peak memory above the packed weights is about twice the largest projection. Raises what ModelFiles.tensor does.
    """
    spec, family = files.spec, FAMILIES[files.spec.family]
    total, done = spec.num_layers + 2, 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done / total)

    def vector(weight: Weight, layer: int = 0) -> Tensor:
        return _fused([files.tensor(f"{weight.name.format(layer=layer)}.weight", dtype)], device)

    def packed(*parts: Weight, layer: int = 0) -> PackedLinear:
        names = [part.name.format(layer=layer) for part in parts]
        has_bias = parts[0].bias is not None and getattr(spec, parts[0].bias)
        bias = _fused([files.tensor(f"{name}.bias", dtype) for name in names], device) if has_bias else None
        return pack(_fused([files.tensor(f"{name}.weight", dtype) for name in names], device), bias)

    embedding = packed(family.embedding)
    advance()
    layers = []
    for index in range(spec.num_layers):
        layers.append(
            LayerWeights(
                attention_norm=vector(family.attention_norm, index),
                qkv=packed(family.query, family.key, family.value, layer=index),
                attention_output=packed(family.attention_output, layer=index),
                mlp_norm=vector(family.mlp_norm, index),
                gate_up=packed(family.gate, family.up, layer=index),
                down=packed(family.down, layer=index),
            )
        )
        advance()
    final_norm = vector(family.final_norm)
    head = embedding if spec.tie_embeddings else packed(family.head)
    advance()
    return ModelWeights(embedding, tuple(layers), final_norm, head)


def _fused(parts: list[Tensor], device: torch.device) -> Tensor:
    """One after the other along the rows. A lone part is copied too: it may still lie in the mapping of its file."""
    out = torch.empty(sum(part.shape[0] for part in parts), *parts[0].shape[1:], dtype=parts[0].dtype, device=device)
    start = 0
    while parts:
        part = parts.pop(0)
        out[start : start + part.shape[0]] = part
        start += part.shape[0]
    return out
