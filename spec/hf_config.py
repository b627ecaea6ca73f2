"""ModelSpec from a Hugging Face `config.json`. A family is a row of HF_FAMILIES: a function of what is its own.

A row returns the fields of ModelSpec in which the family differs from a plain Llama; what all share is read in
`model_from_hf`. Configurations of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) are read alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from spec.errors import InvalidModel, UnsupportedModel
from spec.hf_defaults import DEFAULTS
from spec.hf_rope import partial_rotary, rope_kind, rope_of, rope_parameters, yarn_magnitude
from spec.hf_values import Config, token_ids, whole
from spec.model import LatentSpec, LayerSpec, ModelSpec, MoeSpec

MAX_LAYERS = 10_000  # each is an object here, before any file is asked whether it has them


def model_from_hf(config: Config) -> ModelSpec:
    """Raises UnsupportedModel for a family or option no row knows, InvalidModel for a key that is missing or does not
    fit."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in HF_FAMILIES:
        known = ", ".join(sorted(HF_FAMILIES))
        raise UnsupportedModel(f"model_type {family!r} is not known; known are {known}", family=family)
    if "text_config" in config:  # of a model that sees images too: its text part is served
        text = config["text_config"]
        if not isinstance(text, Mapping):
            raise InvalidModel(f"config.json: text_config must be an object, is {text!r}")
        config = {**config, **text, "model_type": family}
    config = {**DEFAULTS.get(family, {}), **config}
    try:
        spec = _read(family, config)
        spec.check()
    except KeyError as missing:
        raise InvalidModel(f"config.json has no {missing.args[0]!r}") from None
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise InvalidModel(f"config.json holds a value that does not fit: {error}") from None
    return spec


def _read(family: str, config: Config) -> ModelSpec:
    hidden_size, num_heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    head_dim = whole(config, "head_dim", 0) or hidden_size // num_heads
    if whole(config, "num_hidden_layers") > MAX_LAYERS:
        raise InvalidModel(f"config.json: num_hidden_layers must be at most {MAX_LAYERS}")
    fields: dict[str, Any] = {
        "family": family,
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "num_kv_heads": whole(config, "num_key_value_heads", 0) or num_heads,
        "head_dim": head_dim,
        "intermediate_size": whole(config, "intermediate_size"),
        "vocab_size": whole(config, "vocab_size"),
        "max_context_tokens": whole(config, "max_position_embeddings"),
        "rms_norm_eps": float(config["rms_norm_eps"]),
        "layers": (LayerSpec(window=_window(config)),) * whole(config, "num_hidden_layers"),
        "ropes": (rope_of(config, rope_parameters(config)),),
        "rotary_dim": int(head_dim * partial_rotary(config)),
        "attention_scale": head_dim**-0.5,
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "bos_token_id": next(iter(token_ids(config, "bos_token_id")), None),
        "eos_token_ids": token_ids(config, "eos_token_id"),
    }
    fields |= HF_FAMILIES[family](config)
    if fields.get("activation", "silu") == "silu" and config.get("hidden_act", "silu") != "silu":
        raise UnsupportedModel(f"hidden_act {config['hidden_act']!r} is not known to family {family}, only silu")
    return ModelSpec(**fields)


# ---- families --------------------------------------------------------------------------------------------------------


def _llama(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "mlp_bias": bool(config.get("mlp_bias", False))}


def _plain(config: Config) -> dict[str, Any]:
    return {}


def _mixtral(config: Config) -> dict[str, Any]:
    moe = MoeSpec(
        num_experts=whole(config, "num_local_experts"),
        experts_per_token=whole(config, "num_experts_per_tok"),
        intermediate_size=whole(config, "intermediate_size"),
    )
    return {"moe": moe, "layers": _layers(config, window=_window(config), is_moe=True)}


def _qwen2(config: Config) -> dict[str, Any]:
    return {"qkv_bias": True, "layers": _qwen_layers(config)}


def _qwen3(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"qkv_bias": bias, "output_bias": bias, "qk_norm": True, "layers": _qwen_layers(config)}


def _qwen3_moe(config: Config) -> dict[str, Any]:
    num_layers, step = whole(config, "num_hidden_layers"), whole(config, "decoder_sparse_step", 1)
    dense = set(config.get("mlp_only_layers") or ())
    window = _window(config) if config.get("use_sliding_window") else None
    layers = [LayerSpec(window, 0, i not in dense and (i + 1) % step == 0) for i in range(num_layers)]
    moe = MoeSpec(
        num_experts=whole(config, "num_experts", 0) or whole(config, "num_local_experts"),
        experts_per_token=whole(config, "num_experts_per_tok"),
        intermediate_size=whole(config, "moe_intermediate_size"),
        normalise=bool(config.get("norm_topk_prob", False)),
    )
    return _qwen3(config) | {"moe": moe, "layers": tuple(layers)}


def _gemma(config: Config) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    if config.get("hidden_activation", "gelu_pytorch_tanh") != "gelu_pytorch_tanh":
        raise UnsupportedModel(f"hidden_activation {config['hidden_activation']!r} is not known to Gemma")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel("use_bidirectional_attention is not known to Gemma")
    bias = bool(config.get("attention_bias", False))
    return {
        "activation": "gelu_tanh",
        "norm_offset": 1.0,
        "post_norms": True,
        "embedding_scale": math.sqrt(whole(config, "hidden_size")),
        "attention_scale": math.pow(config.get("query_pre_attn_scalar", 256), -0.5),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
        "qkv_bias": bias,
        "output_bias": bias,
        "attention_softcap": _optional(config.get("attn_logit_softcapping")),
        "logits_softcap": _optional(config.get("final_logit_softcapping")),
    }


def _gemma2(config: Config) -> dict[str, Any]:
    softcaps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # where the file is silent
    return _gemma({**softcaps, **config}) | {"layers": _sliding_layers(config, lambda index: index % 2 == 0)}


def _gemma3(config: Config) -> dict[str, Any]:
    pattern = whole(config, "sliding_window_pattern", 0) or whole(config, "_sliding_window_pattern", 6)
    layers = _sliding_layers(config, lambda index: (index + 1) % pattern != 0, local_rope=True)
    parameters = config.get("rope_parameters") or {}
    # transformers 4 has keys of their own for these two
    everywhere = {"rope_theta": config.get("rope_theta", 1e6), **(config.get("rope_scaling") or {})}
    local = {"rope_theta": config.get("rope_local_base_freq", 1e4)}
    everywhere, local = parameters.get("full_attention", everywhere), parameters.get("sliding_attention", local)
    ropes = rope_of(config, everywhere), rope_of(config, local)
    return _gemma(config) | {"layers": layers, "qk_norm": True, "ropes": ropes}


def _gpt_oss(config: Config) -> dict[str, Any]:
    for key, value in (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)):
        if float(config.get(key, value)) != value:
            raise UnsupportedModel(f"{key} {config[key]} is not known to family gpt_oss, only {value}")
    moe = MoeSpec(
        num_experts=whole(config, "num_local_experts"),
        experts_per_token=whole(config, "num_experts_per_tok", 0) or whole(config, "experts_per_token"),
        intermediate_size=whole(config, "intermediate_size"),
        scoring="softmax_chosen",
        router_bias=True,
        expert_bias=True,
    )
    bias = bool(config.get("attention_bias", True))
    return {
        "activation": "swiglu_clamped",
        "moe": moe,
        "layers": _sliding_layers(config, lambda index: index % 2 == 0, is_moe=True),
        "sinks": True,
        "qkv_bias": bias,
        "output_bias": bias,
    }


def _deepseek_v2(config: Config) -> dict[str, Any]:
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy") or config.get("norm_topk_prob"):
        raise UnsupportedModel(f"topk_method {method!r} with norm_topk_prob is not known to family deepseek_v2")
    grouped = method == "group_limited_greedy"
    return _deepseek(
        config,
        scoring="softmax",
        normalise=False,
        num_groups=whole(config, "n_group") if grouped else 1,
        groups_per_token=whole(config, "topk_group") if grouped else 1,
    )


def _deepseek_v3(config: Config) -> dict[str, Any]:
    return _deepseek(
        config,
        scoring="sigmoid",
        normalise=bool(config.get("norm_topk_prob", True)),
        num_groups=whole(config, "n_group"),
        groups_per_token=whole(config, "topk_group"),
        group_score="top2",
        selection_bias=True,
    )


def _deepseek(config: Config, **routing: Any) -> dict[str, Any]:
    if config.get("attention_bias"):
        raise UnsupportedModel("attention_bias is not known to the DeepSeek families")
    if not config.get("rope_interleave", True):
        raise UnsupportedModel("rope_interleave false is not known to the DeepSeek families")
    latent = LatentSpec(
        query_rank=whole(config, "q_lora_rank", 0) or None,
        kv_rank=whole(config, "kv_lora_rank"),
        plain_dim=whole(config, "qk_nope_head_dim"),
        rope_dim=whole(config, "qk_rope_head_dim"),
        value_dim=whole(config, "v_head_dim"),
    )
    moe = MoeSpec(
        num_experts=whole(config, "n_routed_experts"),
        experts_per_token=whole(config, "num_experts_per_tok"),
        intermediate_size=whole(config, "moe_intermediate_size"),
        scale=float(config.get("routed_scaling_factor", 1.0)),
        shared_intermediate_size=whole(config, "moe_intermediate_size") * whole(config, "n_shared_experts", 0),
        **routing,
    )
    first_moe = whole(config, "first_k_dense_replace", 0)
    if whole(config, "moe_layer_freq", 1) != 1:
        raise UnsupportedModel(
            f"moe_layer_freq {config['moe_layer_freq']} is not known to the DeepSeek families, only 1"
        )
    parameters = rope_parameters(config)
    magnitude = 1.0
    if rope_kind(parameters) != "default" and parameters.get("mscale_all_dim"):
        magnitude = yarn_magnitude(float(parameters["factor"]), float(parameters["mscale_all_dim"]))
    return {
        "latent": latent,
        "moe": moe,
        "num_kv_heads": 1,
        "head_dim": latent.kv_rank + latent.rope_dim,
        "rotary_dim": latent.rope_dim,
        "attention_scale": (latent.plain_dim + latent.rope_dim) ** -0.5 * magnitude**2,
        "layers": tuple(LayerSpec(is_moe=index >= first_moe) for index in range(whole(config, "num_hidden_layers"))),
    }


HF_FAMILIES: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _plain,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "phi3": _plain,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}


# ---- layers ----------------------------------------------------------------------------------------------------------


def _window(config: Config) -> int | None:
    return None if config.get("sliding_window") is None else whole(config, "sliding_window")


def _layers(config: Config, **options: Any) -> tuple[LayerSpec, ...]:
    return (LayerSpec(**options),) * whole(config, "num_hidden_layers")


def _sliding_layers(
    config: Config, slides: Callable[[int], bool], *, local_rope: bool = False, is_moe: bool = False
) -> tuple[LayerSpec, ...]:
    """As `layer_types` says, or where it is not there, layers for whose index `slides` is true."""
    kinds, window = config.get("layer_types"), _window(config)
    if unknown := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(
            f"layer_types {sorted(map(repr, unknown))[0]} is not known to family {config['model_type']}"
        )
    layers = []
    for index in range(whole(config, "num_hidden_layers")):
        sliding = kinds[index] == "sliding_attention" if kinds else slides(index)
        layers.append(LayerSpec(window if sliding else None, int(sliding and local_rope), is_moe))
    return tuple(layers)


def _qwen_layers(config: Config) -> tuple[LayerSpec, ...]:
    if not config.get("use_sliding_window"):
        return _layers(config)
    first = whole(config, "max_window_layers", 0)
    return _sliding_layers(config, lambda index: index >= first)


# ---- values ----------------------------------------------------------------------------------------------------------


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)
