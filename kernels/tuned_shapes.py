"""Shapes of real models, with at least one for every row of every table in tuned/: what the tuner times, and what is
compiled where there is no GPU."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from kernels.tuned_calls import (
    Call,
    attention,
    experts,
    fp8,
    fp8_rows,
    gate,
    norm,
    pack,
    quantised,
    rope,
    route,
    sample,
)


@dataclasses.dataclass(frozen=True, slots=True)
class TunedShape:
    operation: str  # whose table it is timed for; it may launch others
    make: Callable[[torch.device], Call]


HALF, BRAIN, SINGLE, INT8, FP8 = torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
SCALES = torch.float8_e8m0fnu
SMOL, LLAMA, GEMMA, OSS = (9, 3, 64), (64, 8, 128), (16, 8, 256), (64, 8, 64)
LATENT, MANY_LATENT, WHOLE = (16, 1, 576), (128, 1, 576), (16, 16, 192)
OF_LATENT: dict[str, Any] = {"value_dim": 512, "latent": True}
CHUNK: dict[str, Any] = {"batch": 4, "queries": 1024}
CAPPED: dict[str, Any] = {"window": 4096, "softcap": 50.0}

_ATTENTION: dict[str, dict[str, Any]] = {
    "decode bf16 9/3 64": {"heads": SMOL},
    "decode bf16 16/8 256 window cap": {"heads": GEMMA, **CAPPED},
    "decode bf16 32/1 64": {"heads": (32, 1, 64)},
    "decode bf16 71/1 64": {"heads": (71, 1, 64)},
    "decode bf16 32/1 96": {"heads": (32, 1, 96)},
    "decode bf16 48/1 128": {"heads": (48, 1, 128)},
    "decode bf16 16/16 192/128": {"heads": WHOLE, "value_dim": 128},
    "decode bf16 16/8 256 fp8": {"heads": GEMMA, "kv_dtype": FP8},
    "decode bf16 32/1 256 fp8": {"heads": (32, 1, 256), "kv_dtype": FP8},
    "decode bf16 latent 128 fp8": {"heads": MANY_LATENT, **OF_LATENT, "splits": 8, "kv_dtype": FP8},
    "decode fp32 9/3 64": {"heads": SMOL, "dtype": SINGLE},
    "decode fp32 64/8 128 fp8": {"heads": LLAMA, "dtype": SINGLE, "kv_dtype": FP8},
    "chunk bf16 9/3 64": {"heads": SMOL, **CHUNK},
    "chunk bf16 32/32 96": {"heads": (32, 32, 96), **CHUNK},
    "chunk fp16 32/8 128": {"heads": (32, 8, 128), "dtype": HALF, **CHUNK},
    "chunk bf16 16/8 256 window cap": {"heads": GEMMA, **CHUNK, **CAPPED},
    "chunk bf16 64/8 64 window sinks": {"heads": OSS, **CHUNK, "window": 128, "has_sinks": True},
    "chunk bf16 64/8 128 fp8": {"heads": LLAMA, **CHUNK, "kv_dtype": FP8},
    "chunk bf16 16/8 256 fp8": {"heads": GEMMA, **CHUNK, "kv_dtype": FP8},
    "chunk bf16 16/16 192/128": {"heads": WHOLE, "value_dim": 128, **CHUNK},
    "chunk bf16 latent 16": {"heads": LATENT, **OF_LATENT, **CHUNK},
    "chunk bf16 latent 128 fp8": {"heads": MANY_LATENT, **OF_LATENT, **CHUNK, "kv_dtype": FP8},
    "chunk fp32 9/3 64": {"heads": SMOL, "dtype": SINGLE, **CHUNK},
    "chunk fp32 64/8 128 int8": {"heads": LLAMA, "dtype": SINGLE, **CHUNK, "kv_dtype": INT8},
    "chunk fp32 latent 16": {"heads": LATENT, **OF_LATENT, "dtype": SINGLE, **CHUNK},
}
_JOINED: dict[str, dict[str, Any]] = {  # whose parts are joined
    "bf16 64/8 128, 8 splits": {"heads": LLAMA, "splits": 8},
    "bf16 64/8 64 window sinks, 64 splits": {"heads": OSS, "splits": 64, "window": 128, "has_sinks": True},
    "bf16 64/8 128 fp8, 64 splits": {"heads": LLAMA, "splits": 64, "kv_dtype": FP8},
    "bf16 latent 16, 32 splits": {"heads": LATENT, **OF_LATENT, "splits": 32},
    "bf16 latent 128, 64 splits": {"heads": MANY_LATENT, **OF_LATENT, "splits": 64},
}
_NORM: dict[str, dict[str, Any]] = {f"bf16 {size}": {"hidden_size": size} for size in (128, 576, 2048, 4096, 8192)}
_GATE: dict[str, dict[str, Any]] = {
    "silu bf16 1536": {"intermediate_size": 1536, "kind": "silu"},
    "gelu_tanh bf16 9216": {"intermediate_size": 9216, "kind": "gelu_tanh"},
    "swiglu bf16 2880": {"intermediate_size": 2880, "kind": "swiglu_clamped"},
}
_PACK: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, no digest": {"has_digest": False},
    "bf16 latent, odd": {"heads": (1, 576), "planes": 1, "layers": 61},
    "int8": {"source": INT8, "target": INT8},
    "bf16 to fp8": {"target": FP8},
    "int8 to bf16": {"source": INT8},
    "fp8 to int8": {"source": FP8, "target": INT8},
}
_ROPE: dict[str, dict[str, Any]] = {
    "bf16 9/3 64": {"heads": SMOL},
    "bf16 64/8 128": {"heads": LLAMA},
    "bf16 24/8 128 partial": {"heads": (24, 8, 128), "rotary": (96, 0)},
    "bf16 8/4 256 normed": {"heads": (8, 4, 256), "has_norms": True},
    "bf16 32/8 128 normed int8": {"heads": (32, 8, 128), "has_norms": True, "kv_dtype": INT8},
    "bf16 64/8 64 fp8": {"heads": OSS, "kv_dtype": FP8},
    "bf16 latent": {"heads": MANY_LATENT, "rotary": (64, 512), "has_values": False},
    "bf16 latent fp8": {"heads": LATENT, "rotary": (64, 512), "has_values": False, "kv_dtype": FP8},
}
_ROUTE: dict[str, dict[str, Any]] = {
    "softmax 128": {"num_experts": 128, "has_bias": False, "scoring": "softmax", "normalise": True},
    "gpt-oss 32": {"num_experts": 32, "has_bias": True, "scoring": "softmax_chosen", "normalise": False},
    "v3 256": {
        **{"num_experts": 256, "has_bias": True, "scoring": "sigmoid", "normalise": True},
        **{"num_groups": 8, "groups_per_token": 4, "group_score": "top2"},
    },
    "softmax 384": {"num_experts": 384, "has_bias": False, "scoring": "softmax", "normalise": True},
}
QWEN: dict[str, Any] = {"num_experts": 128, "intermediate_size": 768, "hidden_size": 2048}
OSS_EXPERTS: dict[str, Any] = {"num_experts": 32, "intermediate_size": 2880, "hidden_size": 2880, "has_bias": True}
ODD: dict[str, Any] = {"num_experts": 8, "intermediate_size": 123, "hidden_size": 431, "has_bias": True, "dtype": HALF}
EIGHT: dict[str, Any] = {"num_experts": 8, "intermediate_size": 768, "hidden_size": 2048, "dtype": SINGLE}
_EXPERTS: dict[str, dict[str, Any]] = {
    "bf16 decode": {**QWEN, "num_tokens": 32},
    "bf16 some rows": {**OSS_EXPERTS, "num_tokens": 256},
    "bf16 chunk": {**QWEN, "num_tokens": 4096},
    "bf16 small chunk": {**QWEN, "num_tokens": 2048},
    "fp16 some rows, odd": {**ODD, "num_tokens": 64},
    "fp16 chunk, odd": {**ODD, "num_tokens": 999},
    "fp32 decode": {**EIGHT, "num_tokens": 4},
    "fp32 some rows": {**EIGHT, "num_tokens": 64},
    "fp32 chunk": {**EIGHT, "num_tokens": 999},
}
FP8_BLOCKS: dict[str, Any] = {"kind": "fp8", "group": 128}
MXFP4: dict[str, Any] = {"kind": "fp4", "group": 32, "scales": SCALES}
NVFP4: dict[str, Any] = {"kind": "fp4", "group": 16, "scales": FP8, "has_output_scales": True}
INT4: dict[str, Any] = {"kind": "int4", "group": 128, "scales": BRAIN, "offsets": SINGLE}
_QUANTISED_EXPERTS: dict[str, dict[str, Any]] = {
    "bf16 mxfp4, decode": {**OSS_EXPERTS, "num_tokens": 32, "form": MXFP4},
    "bf16 fp8 per 128, some rows": {**QWEN, "num_tokens": 999, "form": FP8_BLOCKS},
    "bf16 int4 per 128, chunk": {**QWEN, "num_tokens": 4096, "form": INT4},
    "bf16 nvfp4, chunk": {**QWEN, "num_tokens": 4096, "form": NVFP4},
    "fp16 int4 per 128, odd, chunk": {**ODD, "num_tokens": 999, "form": INT4},
    **{
        f"fp32 fp8 per 128, {num_tokens} tokens": {**EIGHT, "num_tokens": num_tokens, "form": FP8_BLOCKS}
        for num_tokens in (4, 64, 999)
    },
}
_FP8_EXPERTS: dict[str, dict[str, Any]] = {
    name: {**sizes, "num_tokens": num_tokens, "form": form, "activations": "fp8"}
    for name, sizes, num_tokens, form in (
        ("bf16 decode", QWEN, 32, FP8_BLOCKS),
        ("bf16 some rows", QWEN, 1024, FP8_BLOCKS),
        ("bf16 chunk", QWEN, 4096, FP8_BLOCKS),
        ("fp16 odd, per output, chunk", ODD, 999, {"kind": "fp8"}),
    )
}
_FP8_LINEAR: dict[str, dict[str, Any]] = {
    "bf16 per 128, 1 row": {"num_rows": 1, **FP8_BLOCKS},
    "bf16 per 128, 64 rows": {"num_rows": 64, **FP8_BLOCKS},
    "bf16 per 128, 4096 rows": {"num_rows": 4096, **FP8_BLOCKS},
    "bf16 per output, odd, 999 rows": {"num_rows": 999, "kind": "fp8", "size": (431, 999)},
}
_FP8_ROWS: dict[str, dict[str, Any]] = {"bf16 4096 x 7168": {"num_rows": 4096, "size": 7168}}
_SUMS: dict[str, dict[str, Any]] = {"bf16 2880": {**OSS_EXPERTS, "num_tokens": 256}}
_QUANTISED: dict[str, dict[str, Any]] = {
    **{
        f"bf16 {name}, {num_rows} rows": {"num_rows": num_rows, **form}
        for name, num_rows, form in (
            ("int8 per output", 64, {"kind": "int8"}),
            ("int8 per 32", 64, {"kind": "int8", "group": 32, "scales": HALF}),
            ("int4 per 32", 64, {"kind": "int4", "group": 32, "scales": HALF}),
            ("int4 per 128, offsets", 64, INT4),
            ("int4 per 64, offsets", 64, {"kind": "int4", "group": 64, "scales": HALF, "offsets": HALF}),
            ("fp8 per output", 64, {"kind": "fp8"}),
            ("fp8 per 128", 64, FP8_BLOCKS),
            ("mxfp4", 64, MXFP4),
            ("nvfp4", 64, NVFP4),
            ("fp8 per 128", 1, FP8_BLOCKS),
            ("mxfp4", 1, MXFP4),
            ("nvfp4", 32, NVFP4),
        )
    },
    "bf16 fp8 per 8, everything, 64 rows": {
        **{"num_rows": 64, "kind": "fp8", "group": 8, "scales": BRAIN, "offsets": BRAIN, "has_output_scales": True}
    },
    "fp16 int4, odd, 20 rows": {
        **{"num_rows": 20, "kind": "int4", "group": 128, "scales": BRAIN, "offsets": SINGLE, "size": (431, 999)},
        "dtype": HALF,
    },
    **{
        f"fp32 fp8, {num_rows} rows": {"num_rows": num_rows, "kind": "fp8", "group": 128, "dtype": SINGLE}
        for num_rows in (1, 20, 40)
    },
}
_SAMPLING: dict[str, dict[str, Any]] = {
    "fp32 151936": {"vocab": 151_936},
    "fp32 a rank's 32064": {"vocab": 32_064, "first_id": 32_064},
    "bf16 49153": {"vocab": 49_153, "dtype": BRAIN},
    "fp16 431": {"vocab": 431, "dtype": HALF},
}

SHAPES: dict[str, TunedShape] = {
    f"{operation}, {name}": TunedShape(operation, functools.partial(make, **numbers))
    for operation, make, named in (
        ("gated_activation", gate, _GATE),
        ("fp8_linear", fp8, _FP8_LINEAR),
        ("fp8_quantise", fp8_rows, _FP8_ROWS),
        ("grouped_fp8_linear", experts, _FP8_EXPERTS),
        ("grouped_linear", experts, _EXPERTS),
        ("grouped_quantised_linear", experts, _QUANTISED_EXPERTS),
        ("kv_pack", pack, _PACK),
        ("moe_combine", experts, _SUMS),
        ("moe_route", route, _ROUTE),
        ("paged_attention", attention, _ATTENTION),
        ("paged_attention_join", attention, _JOINED),
        ("quantised_linear", quantised, _QUANTISED),
        ("rms_norm", norm, _NORM),
        ("rope_kv_write", rope, _ROPE),
        ("sampling", sample, _SAMPLING),
    )
    for name, numbers in named.items()
}
