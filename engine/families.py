"""What a family calls its weights: a row says role -> Hugging Face name and shape. Adding a family is adding a row.

Shapes are spelled in the words of `sizes_of`; `bias` names the flag of ModelSpec under which the projection has one.
"""

from __future__ import annotations

import dataclasses

from spec.model import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """`name` without ".weight" and ".bias"; {layer} stands for the layer's index."""

    name: str
    shape: tuple[str, ...]
    bias: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    embedding: Weight
    final_norm: Weight
    head: Weight
    attention_norm: Weight
    query: Weight
    key: Weight
    value: Weight
    attention_output: Weight
    mlp_norm: Weight
    gate: Weight
    up: Weight
    down: Weight


LLAMA = Family(
    embedding=Weight("model.embed_tokens", ("vocab", "hidden")),
    final_norm=Weight("model.norm", ("hidden",)),
    head=Weight("lm_head", ("vocab", "hidden")),
    attention_norm=Weight("model.layers.{layer}.input_layernorm", ("hidden",)),
    query=Weight("model.layers.{layer}.self_attn.q_proj", ("queries", "hidden"), "attention_bias"),
    key=Weight("model.layers.{layer}.self_attn.k_proj", ("keys", "hidden"), "attention_bias"),
    value=Weight("model.layers.{layer}.self_attn.v_proj", ("keys", "hidden"), "attention_bias"),
    attention_output=Weight("model.layers.{layer}.self_attn.o_proj", ("hidden", "queries"), "attention_bias"),
    mlp_norm=Weight("model.layers.{layer}.post_attention_layernorm", ("hidden",)),
    gate=Weight("model.layers.{layer}.mlp.gate_proj", ("intermediate", "hidden"), "mlp_bias"),
    up=Weight("model.layers.{layer}.mlp.up_proj", ("intermediate", "hidden"), "mlp_bias"),
    down=Weight("model.layers.{layer}.mlp.down_proj", ("hidden", "intermediate"), "mlp_bias"),
)

FAMILIES: dict[str, Family] = {"llama": LLAMA}


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    return {
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "queries": spec.num_heads * spec.head_dim,
        "keys": spec.num_kv_heads * spec.head_dim,
        "intermediate": spec.intermediate_size,
    }


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model needs, in the order in which it is loaded: Hugging Face name -> shape."""
    sizes, family = sizes_of(spec), FAMILIES[spec.family]
    shapes: dict[str, tuple[int, ...]] = {}

    def add(weight: Weight, layer: int = 0) -> None:
        name = weight.name.format(layer=layer)
        shapes[f"{name}.weight"] = tuple(sizes[word] for word in weight.shape)
        if weight.bias is not None and getattr(spec, weight.bias):
            shapes[f"{name}.bias"] = (sizes[weight.shape[0]],)

    add(family.embedding)
    for layer in range(spec.num_layers):
        for role in dataclasses.fields(family):
            weight: Weight = getattr(family, role.name)
            if "{layer}" in weight.name:
                add(weight, layer)
    add(family.final_norm)
    if not spec.tie_embeddings:
        add(family.head)
    return shapes
