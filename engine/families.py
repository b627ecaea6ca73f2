"""What a family calls its weights: a row says role -> Hugging Face name and shape. Adding a family is adding a row.

Shapes are spelled in the words of `sizes_of`; engine/sharding.py says how each word is cut among ranks. "a+b" along the
first dimension: the parts lie one after the other in one tensor. `bias` names the flag of ModelSpec or MoeSpec under
which there is one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import replace

from spec.model import ModelSpec


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """`name` without its suffix; {layer} and {expert} stand for indices."""

    name: str
    shape: tuple[str, ...]
    bias: str | None = None
    suffix: str = ".weight"
    bias_suffix: str = ".bias"

    def tensor_name(self, layer: int = 0, expert: int = 0) -> str:
        return self.name.format(layer=layer, expert=expert) + self.suffix

    def bias_name(self, layer: int = 0, expert: int = 0) -> str:
        return self.name.format(layer=layer, expert=expert) + self.bias_suffix

    def has_bias(self, spec: ModelSpec) -> bool:
        return self.bias is not None and bool(getattr(spec, self.bias, False) or getattr(spec.moe, self.bias, False))


@dataclasses.dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention. The rotated dimensions lie in pairs; weights.py sorts them into halves."""

    query: Weight  # where queries come straight from the hidden state
    query_down: Weight
    query_norm: Weight
    query_up: Weight
    down: Weight  # latent, then the rotated key
    norm: Weight
    up: Weight  # of each head: plain key, then value


@dataclasses.dataclass(frozen=True, slots=True)
class Moe:
    router: Weight
    gate_up: tuple[Weight, ...]
    down: Weight
    selection_bias: Weight | None = None
    shared_gate_up: tuple[Weight, ...] = ()
    shared_down: Weight | None = None
    stacked: bool = False  # all experts in one tensor [experts, in, out], gate and up in alternating columns


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    embedding: Weight
    final_norm: Weight
    head: Weight
    attention_norm: Weight
    qkv: tuple[Weight, ...]
    output: Weight
    mlp_norm: Weight
    gate_up: tuple[Weight, ...]
    down: Weight
    query_norm: Weight | None = None
    key_norm: Weight | None = None
    sinks: Weight | None = None
    attention_post_norm: Weight | None = None
    mlp_post_norm: Weight | None = None
    latent: Latent | None = None
    moe: Moe | None = None


_LAYER = "model.layers.{layer}."


def _attention(name: str, *shape: str, bias: str | None = None) -> Weight:
    return Weight(f"{_LAYER}self_attn.{name}", shape, bias)


def _mlp(name: str, *shape: str, bias: str | None = None) -> Weight:
    return Weight(f"{_LAYER}mlp.{name}", shape, bias)


def _norm(name: str) -> Weight:
    return Weight(_LAYER + name, ("hidden",))


LLAMA = Family(
    embedding=Weight("model.embed_tokens", ("vocab", "hidden")),
    final_norm=Weight("model.norm", ("hidden",)),
    head=Weight("lm_head", ("vocab", "hidden")),
    attention_norm=_norm("input_layernorm"),
    qkv=(
        _attention("q_proj", "queries", "hidden", bias="qkv_bias"),
        _attention("k_proj", "keys", "hidden", bias="qkv_bias"),
        _attention("v_proj", "keys", "hidden", bias="qkv_bias"),
    ),
    output=_attention("o_proj", "hidden", "queries", bias="output_bias"),
    mlp_norm=_norm("post_attention_layernorm"),
    gate_up=(
        _mlp("gate_proj", "intermediate", "hidden", bias="mlp_bias"),
        _mlp("up_proj", "intermediate", "hidden", bias="mlp_bias"),
    ),
    down=_mlp("down_proj", "hidden", "intermediate", bias="mlp_bias"),
)
QWEN3 = replace(LLAMA, query_norm=_attention("q_norm", "head_dim"), key_norm=_attention("k_norm", "head_dim"))
GEMMA2 = replace(
    LLAMA,
    attention_post_norm=_norm("post_attention_layernorm"),
    mlp_norm=_norm("pre_feedforward_layernorm"),
    mlp_post_norm=_norm("post_feedforward_layernorm"),
)
GEMMA3 = replace(GEMMA2, query_norm=QWEN3.query_norm, key_norm=QWEN3.key_norm)
PHI3 = replace(
    LLAMA,
    qkv=(_attention("qkv_proj", "queries+keys+keys", "hidden"),),
    gate_up=(_mlp("gate_up_proj", "intermediate+intermediate", "hidden"),),
)
MIXTRAL = replace(
    LLAMA,
    moe=Moe(
        router=Weight(f"{_LAYER}block_sparse_moe.gate", ("experts", "hidden")),
        gate_up=(
            Weight(f"{_LAYER}block_sparse_moe.experts.{{expert}}.w1", ("expert_intermediate", "hidden")),
            Weight(f"{_LAYER}block_sparse_moe.experts.{{expert}}.w3", ("expert_intermediate", "hidden")),
        ),
        down=Weight(f"{_LAYER}block_sparse_moe.experts.{{expert}}.w2", ("hidden", "expert_intermediate")),
    ),
)
QWEN3_MOE = replace(
    QWEN3,
    moe=Moe(
        router=_mlp("gate", "experts", "hidden"),
        gate_up=(
            _mlp("experts.{expert}.gate_proj", "expert_intermediate", "hidden"),
            _mlp("experts.{expert}.up_proj", "expert_intermediate", "hidden"),
        ),
        down=_mlp("experts.{expert}.down_proj", "hidden", "expert_intermediate"),
    ),
)
assert QWEN3_MOE.moe is not None
DEEPSEEK = replace(
    LLAMA,
    output=_attention("o_proj", "hidden", "latent_values"),
    latent=Latent(
        query=_attention("q_proj", "latent_queries", "hidden"),
        query_down=_attention("q_a_proj", "query_rank", "hidden"),
        query_norm=_attention("q_a_layernorm", "query_rank"),
        query_up=_attention("q_b_proj", "latent_queries", "query_rank"),
        down=_attention("kv_a_proj_with_mqa", "latent_row", "hidden"),
        norm=_attention("kv_a_layernorm", "kv_rank"),
        up=_attention("kv_b_proj", "latent_up", "kv_rank"),
    ),
    moe=replace(
        QWEN3_MOE.moe,
        selection_bias=Weight(f"{_LAYER}mlp.gate.e_score_correction_bias", ("experts",), suffix=""),
        shared_gate_up=(
            _mlp("shared_experts.gate_proj", "shared_intermediate", "hidden"),
            _mlp("shared_experts.up_proj", "shared_intermediate", "hidden"),
        ),
        shared_down=_mlp("shared_experts.down_proj", "hidden", "shared_intermediate"),
    ),
)
GPT_OSS = replace(
    LLAMA,
    sinks=Weight(f"{_LAYER}self_attn.sinks", ("heads",), suffix=""),
    moe=Moe(
        router=_mlp("router", "experts", "hidden", bias="router_bias"),
        gate_up=(
            Weight(
                f"{_LAYER}mlp.experts.gate_up_proj",
                ("experts", "hidden", "expert_pairs"),
                "expert_bias",
                suffix="",
                bias_suffix="_bias",
            ),
        ),
        down=Weight(
            f"{_LAYER}mlp.experts.down_proj",
            ("experts", "expert_intermediate", "hidden"),
            "expert_bias",
            suffix="",
            bias_suffix="_bias",
        ),
        stacked=True,
    ),
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": MIXTRAL,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": GPT_OSS,
}


def sizes_of(spec: ModelSpec) -> dict[str, int]:
    sizes = {
        "vocab": spec.vocab_size,
        "hidden": spec.hidden_size,
        "heads": spec.num_heads,
        "head_dim": spec.head_dim,
        "queries": spec.num_heads * spec.head_dim,
        "keys": spec.num_kv_heads * spec.head_dim,
        "intermediate": spec.intermediate_size,
    }
    if (moe := spec.moe) is not None:
        sizes |= {
            "experts": moe.num_experts,
            "expert_intermediate": moe.intermediate_size,
            "expert_pairs": 2 * moe.intermediate_size,
            "shared_intermediate": moe.shared_intermediate_size,
        }
    if (latent := spec.latent) is not None:
        sizes |= {
            "query_rank": latent.query_rank or 0,
            "kv_rank": latent.kv_rank,
            "latent_row": latent.kv_rank + latent.rope_dim,
            "latent_queries": spec.num_heads * (latent.plain_dim + latent.rope_dim),
            "latent_up": spec.num_heads * (latent.plain_dim + latent.value_dim),
            "latent_values": spec.num_heads * latent.value_dim,
        }
    return sizes


def layer_weights(spec: ModelSpec, layer: int) -> Iterator[Weight]:
    """What a layer is made of; a weight of experts stands once for all of them."""
    family = FAMILIES[spec.family]
    yield family.attention_norm
    if family.latent is not None and spec.latent is not None:
        yield from (family.latent.down, family.latent.norm, family.latent.up)
        if spec.latent.query_rank is None:
            yield family.latent.query
        else:
            yield from (family.latent.query_down, family.latent.query_norm, family.latent.query_up)
    else:
        yield from family.qkv
    yield family.output
    optional = (family.query_norm, family.key_norm, family.sinks, family.attention_post_norm, family.mlp_post_norm)
    yield from (weight for weight in optional if weight is not None)
    yield family.mlp_norm
    if not spec.layers[layer].is_moe:
        yield from (*family.gate_up, family.down)
        return
    assert family.moe is not None and spec.moe is not None
    yield from (family.moe.router, *family.moe.gate_up, family.moe.down)
    if spec.moe.selection_bias and family.moe.selection_bias is not None:
        yield family.moe.selection_bias
    if spec.moe.shared_intermediate_size and family.moe.shared_down is not None:
        yield from (*family.moe.shared_gate_up, family.moe.shared_down)


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model needs, in the order in which it is loaded: Hugging Face name -> shape."""
    sizes, family = sizes_of(spec), FAMILIES[spec.family]
    shapes: dict[str, tuple[int, ...]] = {}

    def add(weight: Weight, layer: int = 0, expert: int = 0) -> None:
        shape = tuple(sum(sizes[part] for part in word.split("+")) for word in weight.shape)
        shapes[weight.tensor_name(layer, expert)] = shape
        if weight.has_bias(spec):
            is_stacked = len(shape) == 3
            shapes[weight.bias_name(layer, expert)] = (shape[0], shape[2]) if is_stacked else shape[:1]

    add(family.embedding)
    for layer in range(spec.num_layers):
        for weight in layer_weights(spec, layer):
            each_expert = "{expert}" in weight.name and spec.moe is not None
            for expert in range(spec.moe.num_experts if each_expert and spec.moe else 1):
                add(weight, layer, expert)
    add(family.final_norm)
    if not spec.tie_embeddings:
        add(family.head)
    return shapes
