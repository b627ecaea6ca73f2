"""Every Triton kernel compiles to machine code for the GPUs we name, without a GPU, and spills no register.

The launchers choose tiles, specialisations and warps: a recorder stands where the kernel was, and what the launcher
would have launched is what is compiled.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from paged_sequences import Heads, Options, PagedSequences
from quantised_weights import FORMS, drawn_weight

triton = pytest.importorskip("triton", reason="no Triton on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import native_specialize_impl  # noqa: E402

from kernels import (  # noqa: E402
    gated_activation,
    linear,
    moe_mlp,
    moe_route,
    paged_attention_gpu,
    quantised_linear,
    rms_norm,
    rope_kv_write,
    sampling,
)
from kernels.kv_rows import SCALE_BYTES  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")

TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100a"}


class Recorder:
    """Takes launches in the kernel's place, and compiles them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return self._record

    def _record(self, *arguments: Any, **options: Any) -> None:
        self.launches.append((arguments, options))

    def compile(self, capability: int) -> list[Any]:
        assert self.launches
        return [self._compile(capability, *launch) for launch in self.launches]

    def _compile(self, capability: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """As JITFunction does at launch: a tensor or integer that 16 divides is specialised, so is the integer 1."""
        signature, constants, attributes = {}, {}, {}
        for index, (parameter, value) in enumerate(zip(self.kernel.params, arguments, strict=True)):
            kind, key = "constexpr", None
            if not parameter.is_constexpr:
                kind, key = native_specialize_impl(CUDABackend, value, False, not parameter.do_not_specialize, True)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[(index,)] = value
            elif key is not None:
                attributes[(index,)] = CUDABackend.parse_attr(key)
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(ptx: str, target: str, folder: Path) -> dict[str, int]:
    """What the assembler says: registers per thread, and bytes of them that spill."""
    (folder / "kernel.ptx").write_text(ptx)
    tool = (triton.knobs.nvidia.ptxas_blackwell if target.startswith("sm_10") else triton.knobs.nvidia.ptxas).path
    command = [tool, "-v", f"--gpu-name={target}", str(folder / "kernel.ptx"), "-o", str(folder / "kernel.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {"registers": r"Used (\d+) registers", "spilled_bytes": r"(\d+) bytes spill stores"}
    return {name: int(re.findall(pattern, report)[0]) for name, pattern in patterns.items()}


def launch_rms_norm(dtype: torch.dtype, hidden_size: int) -> None:
    x = torch.zeros(4, hidden_size, dtype=dtype)
    rms_norm.launch(x, x[0], 1e-5, x)


def launch_gated_activation(
    dtype: torch.dtype, intermediate_size: int, kind: gated_activation.ActivationKind = "silu"
) -> None:
    gated_activation.launch(torch.zeros(4, 2 * intermediate_size, dtype=dtype), kind)


def launch_rope_kv_write(
    dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    rotary_dim: int | None = None,
    rotary_offset: int = 0,
    has_values: bool = True,
    has_norms: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> None:
    row = head_dim if kv_dtype is None else head_dim + SCALE_BYTES
    memory = torch.zeros(2, 2, 2, num_kv_heads, 16, row, dtype=kv_dtype or dtype)
    qkv = torch.zeros(4, (num_heads + (1 + has_values) * num_kv_heads) * head_dim, dtype=dtype)
    angles, index = torch.zeros(8, (rotary_dim or head_dim) // 2), torch.zeros(4, dtype=torch.int64)
    values, norm = memory[:, 1, 1] if has_values else None, qkv[0, :head_dim] if has_norms else None
    options = {"rotary_offset": rotary_offset, "query_norm": norm, "key_norm": norm, "norm_eps": 1e-6}
    rope_kv_write.launch(qkv, angles, angles, index, index, memory[:, 1, 0], values, num_heads, **options)


def launch_paged_attention(
    dtype: torch.dtype,
    heads: Heads,
    num_tokens: int,  # of four sequences
    num_splits: int = 1,
    kv_dtype: torch.dtype | None = None,
    options: Options | None = None,
) -> None:
    sequences = PagedSequences(heads, [32, 32, 32, 32], dtype, kv_dtype or dtype, block_tokens=16)
    queries = num_tokens // 4
    arguments, keywords = sequences.call([(index, 32 - queries, 32) for index in range(4)], options or Options())
    paged_attention_gpu.launch(*arguments, **keywords, num_splits=num_splits)


def launch_moe_route(num_experts: int, num_groups: int, **options: Any) -> None:
    bias = torch.zeros(num_experts) if num_groups > 1 else None
    groups: dict[str, Any] = {"num_groups": num_groups, "groups_per_token": num_groups // 2} if num_groups > 1 else {}
    moe_route.launch(torch.zeros(4, num_experts), experts_per_token=8, bias=bias, scale=2.5, **groups, **options)


def launch_moe_mlp(
    dtype: torch.dtype, num_experts: int, intermediate_size: int, hidden_size: int, num_tokens: int, with_bias: bool
) -> None:
    def packed(num_outputs: int, depth: int) -> linear.PackedLinear:
        bias = torch.zeros(num_outputs, dtype=dtype) if with_bias else None
        return linear.PackedLinear(torch.zeros(num_outputs, depth, dtype=dtype), bias, num_outputs, depth, dtype)

    gate_up, down = packed(2 * intermediate_size, hidden_size), packed(hidden_size, intermediate_size)
    experts = moe_mlp.join_experts([gate_up] * num_experts, [down] * num_experts)
    expert_ids = torch.zeros(num_tokens, 4, dtype=torch.int64)
    moe_mlp.launch(
        torch.zeros(num_tokens, hidden_size, dtype=dtype), experts, expert_ids, torch.zeros(num_tokens, 4), "silu"
    )


def launch_quantised_linear(dtype: torch.dtype, form: str, n: int, k: int, num_rows: int) -> None:
    quantised_linear.launch(torch.zeros(num_rows, k, dtype=dtype), drawn_weight(FORMS[form], n, k))


def launch_sampling(dtype: torch.dtype, vocab: int, first_id: int = 0) -> None:
    options = torch.tensor([sampling.options_of(1.0, 50, 0.9, 0.05)] * 4, dtype=torch.float64)
    sampling.launch(torch.zeros(4, vocab, dtype=dtype), options, torch.zeros(4, dtype=torch.int64), first_id)


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES: dict[str, tuple[ModuleType, str, Callable[[], None]]] = {
    "rms_norm bf16 576": (rms_norm, "_kernel", lambda: launch_rms_norm(BRAIN, 576)),
    "rms_norm bf16 8192": (rms_norm, "_kernel", lambda: launch_rms_norm(BRAIN, 8192)),
    "rms_norm bf16 128": (rms_norm, "_kernel", lambda: launch_rms_norm(BRAIN, 128)),
    "silu bf16 1536": (gated_activation, "_kernel", lambda: launch_gated_activation(BRAIN, 1536)),
    "gelu_tanh bf16 9216": (gated_activation, "_kernel", lambda: launch_gated_activation(BRAIN, 9216, "gelu_tanh")),
    "swiglu bf16 2880": (gated_activation, "_kernel", lambda: launch_gated_activation(BRAIN, 2880, "swiglu_clamped")),
    "rope_kv_write bf16 9/3 64": (rope_kv_write, "_kernel", lambda: launch_rope_kv_write(BRAIN, 9, 3, 64)),
    "rope_kv_write bf16 64/8 128": (rope_kv_write, "_kernel", lambda: launch_rope_kv_write(BRAIN, 64, 8, 128)),
    "rope_kv_write bf16 24/8 128 partial": (
        rope_kv_write,
        "_kernel",
        lambda: launch_rope_kv_write(BRAIN, 24, 8, 128, rotary_dim=96),
    ),
    "rope_kv_write bf16 8/4 256 normed": (
        rope_kv_write,
        "_kernel",
        lambda: launch_rope_kv_write(BRAIN, 8, 4, 256, has_norms=True),
    ),
    "rope_kv_write bf16 32/8 128 normed int8": (
        rope_kv_write,
        "_kernel",
        lambda: launch_rope_kv_write(BRAIN, 32, 8, 128, has_norms=True, kv_dtype=torch.int8),
    ),
    "rope_kv_write bf16 64/8 64 fp8": (
        rope_kv_write,
        "_kernel",
        lambda: launch_rope_kv_write(BRAIN, 64, 8, 64, kv_dtype=torch.float8_e4m3fn),
    ),
    "rope_kv_write bf16 latent": (
        rope_kv_write,
        "_kernel",
        lambda: launch_rope_kv_write(BRAIN, 128, 1, 576, rotary_dim=64, rotary_offset=512, has_values=False),
    ),
    "rope_kv_write bf16 latent fp8": (
        rope_kv_write,
        "_kernel",
        lambda: launch_rope_kv_write(
            BRAIN, 16, 1, 576, rotary_dim=64, rotary_offset=512, has_values=False, kv_dtype=torch.float8_e4m3fn
        ),
    ),
    "route softmax 128": (moe_route, "_kernel", lambda: launch_moe_route(128, 1, scoring="softmax", normalise=True)),
    "route gpt-oss 32": (
        moe_route,
        "_kernel",
        lambda: launch_moe_route(32, 1, scoring="softmax_chosen", normalise=False),
    ),
    "route v3 256": (
        moe_route,
        "_kernel",
        lambda: launch_moe_route(256, 8, scoring="sigmoid", normalise=True, group_score="top2"),
    ),
    "experts bf16 decode": (moe_mlp, "_product_kernel", lambda: launch_moe_mlp(BRAIN, 128, 768, 2048, 4, False)),
    "experts bf16 some rows": (moe_mlp, "_product_kernel", lambda: launch_moe_mlp(BRAIN, 8, 2880, 2880, 64, True)),
    "experts bf16 chunk": (moe_mlp, "_product_kernel", lambda: launch_moe_mlp(BRAIN, 8, 768, 2048, 999, False)),
    "experts fp16 chunk, odd": (moe_mlp, "_product_kernel", lambda: launch_moe_mlp(HALF, 8, 123, 431, 999, True)),
    "experts fp32 decode": (moe_mlp, "_product_kernel", lambda: launch_moe_mlp(SINGLE, 8, 768, 2048, 4, False)),
    "experts fp32 chunk": (moe_mlp, "_product_kernel", lambda: launch_moe_mlp(SINGLE, 8, 768, 2048, 999, True)),
    **{
        f"quantised bf16 {form}, {num_rows} rows": (
            quantised_linear,
            "_kernel",
            lambda form=form, num_rows=num_rows: launch_quantised_linear(BRAIN, form, 4096, 4096, num_rows),
        )
        for form, num_rows in [*((form, 64) for form in FORMS), ("fp8 per 128", 1), ("mxfp4", 1), ("nvfp4", 32)]
    },
    "quantised fp16 zero points, odd": (
        quantised_linear,
        "_kernel",
        lambda: launch_quantised_linear(HALF, "int4 per 128, zero points", 431, 999, 20),
    ),
    "quantised fp32 fp8": (
        quantised_linear,
        "_kernel",
        lambda: launch_quantised_linear(SINGLE, "fp8 per 128", 512, 576, 40),
    ),
    "sampling fp32 151936": (sampling, "_kernel", lambda: launch_sampling(SINGLE, 151_936)),
    "sampling fp32 a rank's 32064": (sampling, "_kernel", lambda: launch_sampling(SINGLE, 32_064, 32_064)),
    "sampling bf16 49153": (sampling, "_kernel", lambda: launch_sampling(BRAIN, 49_153)),
    "sampling fp16 431": (sampling, "_kernel", lambda: launch_sampling(HALF, 431)),
    "experts' sum": (moe_mlp, "_combine_kernel", lambda: launch_moe_mlp(BRAIN, 8, 768, 2048, 4, False)),
}

INT8, FP8 = torch.int8, torch.float8_e4m3fn
SMOL, LLAMA, GEMMA, OSS = Heads(9, 3, 64), Heads(64, 8, 128), Heads(16, 8, 256), Heads(64, 8, 64)
LATENT, MANY_LATENT, WHOLE = Heads(16, 1, 576, 512, True), Heads(128, 1, 576, 512, True), Heads(16, 16, 192, 128)
ATTENTION: dict[str, tuple[Any, ...]] = {  # arguments of launch_paged_attention
    "decode bf16 9/3 64": (BRAIN, SMOL, 4),
    "decode bf16 64/8 128 split": (BRAIN, LLAMA, 4, 8),
    "decode bf16 16/8 256 window cap": (BRAIN, GEMMA, 4, 1, None, Options(window=4096, softcap=50.0)),
    "decode bf16 64/8 64 window sinks": (BRAIN, OSS, 4, 8, None, Options(window=128, sinks=True)),
    "decode bf16 64/8 128 fp8": (BRAIN, LLAMA, 4, 8, FP8),
    "decode bf16 32/1 96": (BRAIN, Heads(32, 1, 96), 4),
    "decode bf16 16/16 192/128": (BRAIN, WHOLE, 4),
    "decode bf16 latent 16": (BRAIN, LATENT, 4, 8),
    "decode bf16 latent 128": (BRAIN, MANY_LATENT, 4, 8),
    "decode bf16 latent 128 fp8": (BRAIN, MANY_LATENT, 4, 8, FP8),
    "chunk bf16 9/3 64": (BRAIN, SMOL, 100),
    "chunk bf16 32/32 96": (BRAIN, Heads(32, 32, 96), 100),
    "chunk fp16 32/8 128": (HALF, Heads(32, 8, 128), 100),
    "chunk bf16 16/8 256 window cap": (BRAIN, GEMMA, 100, 1, None, Options(window=4096, softcap=50.0)),
    "chunk bf16 64/8 64 window sinks": (BRAIN, OSS, 100, 1, None, Options(window=128, sinks=True)),
    "chunk bf16 64/8 128 fp8": (BRAIN, LLAMA, 100, 1, FP8),
    "chunk bf16 16/8 256 fp8": (BRAIN, GEMMA, 100, 1, FP8),
    "chunk bf16 16/16 192/128": (BRAIN, WHOLE, 100),
    "chunk bf16 latent 16": (BRAIN, LATENT, 100),
    "chunk bf16 latent 128 fp8": (BRAIN, MANY_LATENT, 100, 1, FP8),
    "chunk fp32 9/3 64": (SINGLE, SMOL, 100),
    "chunk fp32 64/8 128 int8": (SINGLE, LLAMA, 100, 1, INT8),
    "chunk fp32 latent 16": (SINGLE, LATENT, 100),
    "decode fp32 64/8 128 fp8": (SINGLE, LLAMA, 4, 1, FP8),
    "decode bf16 16/8 256 fp8": (BRAIN, GEMMA, 4, 1, FP8),
}
CASES |= {
    name: (paged_attention_gpu, "_attend_kernel", functools.partial(launch_paged_attention, *arguments))
    for name, arguments in ATTENTION.items()
}
CASES["join bf16 128"] = (paged_attention_gpu, "_join_kernel", lambda: launch_paged_attention(BRAIN, LLAMA, 4, 8))
CASES["join bf16 512"] = (paged_attention_gpu, "_join_kernel", lambda: launch_paged_attention(BRAIN, LATENT, 4, 64))


@pytest.mark.parametrize("capability", list(TARGETS))
@pytest.mark.parametrize("case", list(CASES))
def test_compiles_without_a_spill(case: str, capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, name, launch = CASES[case]
    recorders = {}
    for used in {module for module, _, _ in CASES.values()}:
        for kernel in [attribute for attribute in vars(used) if attribute.endswith("_kernel")]:
            recorders[used, kernel] = Recorder(getattr(used, kernel))
            monkeypatch.setattr(used, kernel, recorders[used, kernel])
    launch()
    for compiled in recorders[module, name].compile(capability):
        assert f".target {TARGETS[capability]}" in compiled.asm["ptx"]
        assert compiled.asm["cubin"]
        used_by = usage(compiled.asm["ptx"], TARGETS[capability], tmp_path)
        print(f"\n{case:28} {TARGETS[capability]:8} {used_by} shared_bytes {compiled.metadata.shared}")
        assert used_by["spilled_bytes"] == 0
        assert compiled.metadata.shared <= 99 * 1024, (
            "does not fit the smallest of these GPUs' relatives (sm_86, sm_89)"
        )
