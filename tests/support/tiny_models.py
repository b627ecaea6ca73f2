"""A small random model of each family on disk, with the odd options of the family switched on: oracles of P1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 64,
}


def _config(name: str, **options: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**{**SIZES, **options})


def _deepseek(name: str, **options: Any) -> Callable[[], PretrainedConfig]:
    return _config(
        name,
        num_key_value_heads=8,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=10,
        n_routed_experts=8,
        n_shared_experts=2,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_group=4,
        topk_group=2,
        **EXPERTS,
        **options,
    )


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama2-mha": _config("Llama", num_key_value_heads=8, tie_word_embeddings=False),
    "llama3": _config("Llama", head_dim=12, rope_theta=500000.0, tie_word_embeddings=False),
    "llama3.1": _config("Llama", rope_scaling=LLAMA3_ROPE, tie_word_embeddings=False),
    "llama3.2-tied": _config("Llama", rope_scaling=LLAMA3_ROPE, num_key_value_heads=2, tie_word_embeddings=True),
    "llama-odd": _config(  # nothing of it is even: three KV heads, 9 heads, 77 columns
        "Llama", num_attention_heads=9, num_key_value_heads=3, head_dim=8, intermediate_size=77, hidden_size=45
    ),
    "mistral": _config("Mistral", head_dim=10, sliding_window=19, tie_word_embeddings=False),
    "mixtral": _config("Mixtral", num_local_experts=4, sliding_window=None, **EXPERTS),
    "gpt-moe": _config("Mixtral", num_local_experts=8, num_key_value_heads=8, **EXPERTS),
    "qwen2": _config("Qwen2", use_sliding_window=True, sliding_window=17, max_window_layers=2),
    "qwen3": _config("Qwen3", head_dim=14, attention_bias=True, tie_word_embeddings=True),
    "qwen3-moe": _config(
        "Qwen3Moe",
        head_dim=12,
        num_experts=8,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        mlp_only_layers=[1],
        **EXPERTS,
    ),
    "gemma2": _config(
        "Gemma2",
        head_dim=14,
        sliding_window=13,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": _config(
        "Gemma3Text",
        head_dim=14,
        sliding_window=13,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi3-longrope": _config(
        "Phi3",
        head_dim=6,
        original_max_position_embeddings=32,
        rope_scaling={"type": "longrope", "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.5, 7.0]},
    ),
    "phi4-partial": _config("Phi3", num_attention_heads=4, num_key_value_heads=2, partial_rotary_factor=0.5),
    "deepseek-v2": _deepseek(
        "DeepseekV2", topk_method="group_limited_greedy", routed_scaling_factor=1.5, q_lora_rank=16
    ),
    "deepseek-v2-lite": _deepseek("DeepseekV2", topk_method="greedy", q_lora_rank=None),
    "deepseek-v3": _deepseek(
        "DeepseekV3",
        q_lora_rank=16,
        rope_scaling={**YARN, "mscale": 1.0, "mscale_all_dim": 0.8},
    ),
    "gpt-oss": _config(
        "GptOss",
        head_dim=10,
        num_local_experts=8,
        sliding_window=11,
        rope_scaling={**YARN, "truncate": False},
        **EXPERTS,
    ),
}
MOE_MODELS = ["mixtral", "gpt-moe", "qwen3-moe", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "gpt-oss"]


def make_model(folder: Path, name: str, seed: int = 0, **sizes: int) -> Path:
    """Writes config.json and model.safetensors; weights wide enough for sharp logits, and none at a neutral value."""
    torch.manual_seed(seed)
    config = MODELS[name]()
    for key, value in sizes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter_name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in parameter_name or "embed_scale" in parameter_name:
            continue
        is_norm = "norm" in parameter_name and not parameter_name.endswith("bias")
        mean = float(is_norm and "gemma" not in name)
        small = is_norm or parameter_name.endswith(("bias", "sinks", "e_score_correction_bias"))
        torch.nn.init.normal_(parameter, mean=mean, std=0.3 if small else 0.15)
    model.save_pretrained(folder)
    return folder
