"""Calls of the kernels' launchers and of their references, by shape, as the tuner times and compilation records them.

Elsewhere than on a GPU tensors are not filled in, and so take no memory: a launcher reads none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels import (
    fp8_linear,
    gated_activation,
    kv_pack,
    linear,
    moe_mlp,
    moe_route,
    paged_attention,
    paged_attention_gpu,
    quantised_linear,
    rms_norm,
    rope_kv_write,
    sampling,
)
from kernels.kv_rows import LARGEST_CODE, SCALE_BYTES, dequantise_rows, quantise_rows
from kernels.quantised import CODE_DTYPES, NUMBERS, Activations, Kind, QuantisedWeight

Results = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    launch: Callable[[], Any]
    results: Callable[[], Results]  # of a launch
    expected: Callable[[], Results]  # of the reference


BRAIN, SINGLE = torch.bfloat16, torch.float32
BLOCK_TOKENS = 16


def _drawn(device: torch.device, *shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.randn(shape, device=device).to(dtype) if device.type == "cuda" else torch.empty(shape, dtype=dtype)


def _drawn_rows(device: torch.device, *shape: int, dtype: torch.dtype, kv_dtype: torch.dtype | None) -> Tensor:
    """KV memory whose last dimension is a row of `shape[-1]` numbers."""
    if kv_dtype is None:
        return _drawn(device, *shape, dtype=dtype)
    if device.type == "cuda":
        return quantise_rows(torch.randn(shape, device=device), kv_dtype)
    return torch.empty(*shape[:-1], shape[-1] + SCALE_BYTES, dtype=kv_dtype)


def _plain(rows: Tensor) -> Tensor:
    return dequantise_rows(rows) if rows.dtype in LARGEST_CODE else rows.clone()


def norm(device: torch.device, *, num_tokens: int = 4096, hidden_size: int, dtype: torch.dtype = BRAIN) -> Call:
    x, residual = (_drawn(device, num_tokens, hidden_size, dtype=dtype) for _ in range(2))
    arguments = x, _drawn(device, hidden_size, dtype=dtype), 1e-5, residual
    run = functools.partial(rms_norm.launch, *arguments)
    return Call(run, run, functools.partial(rms_norm.reference, *arguments))


def gate(
    device: torch.device, *, num_tokens: int = 4096, intermediate_size: int, kind: gated_activation.ActivationKind
) -> Call:
    gate_up = _drawn(device, num_tokens, 2 * intermediate_size, dtype=BRAIN)
    run = functools.partial(gated_activation.launch, gate_up, kind)
    return Call(run, lambda: (run(),), lambda: (gated_activation.reference(gate_up, kind),))


def rope(
    device: torch.device,
    *,
    num_tokens: int = 4096,
    heads: tuple[int, int, int],  # query heads, KV heads, size
    rotary: tuple[int, int] | None = None,  # dimensions that turn, and the first of them
    has_values: bool = True,
    has_norms: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> Call:
    num_heads, num_kv_heads, head_dim = heads
    rotary_dim, rotary_offset = rotary or (head_dim, 0)
    shape = num_tokens // BLOCK_TOKENS, 1 + has_values, num_kv_heads, BLOCK_TOKENS, head_dim
    memory = _drawn_rows(device, *shape, dtype=BRAIN, kv_dtype=kv_dtype)
    keys, values = memory[:, 0], memory[:, 1] if has_values else None
    qkv = _drawn(device, num_tokens, (num_heads + (1 + has_values) * num_kv_heads) * head_dim, dtype=BRAIN)
    cos, sin = (_drawn(device, num_tokens, rotary_dim // 2) for _ in range(2))
    index = torch.arange(num_tokens, device=device)
    norm = _drawn(device, head_dim, dtype=BRAIN) if has_norms else None
    options = {"rotary_offset": rotary_offset, "query_norm": norm, "key_norm": norm, "norm_eps": 1e-6}

    def run(turn: Callable[..., Tensor]) -> Tensor:
        return turn(qkv, cos, sin, index, index, keys, values, num_heads, **options)

    def results(turn: Callable[..., Tensor]) -> Results:
        return run(turn), _plain(memory)

    return Call(
        functools.partial(run, rope_kv_write.launch),
        functools.partial(results, rope_kv_write.launch),
        functools.partial(results, rope_kv_write.reference),
    )


def pack(
    device: torch.device,
    *,
    heads: tuple[int, int] = (8, 128),  # KV heads, size
    planes: int = 2,
    layers: int = 8,
    source: torch.dtype = BRAIN,
    target: torch.dtype = BRAIN,
    has_digest: bool = True,
) -> Call:
    """512 blocks of a memory of twice as many."""
    kv_heads, dim = heads

    def memory(num_blocks: int, dtype: torch.dtype) -> Tensor:
        kv_dtype = dtype if dtype in LARGEST_CODE else None
        shape = num_blocks, layers, planes, kv_heads, BLOCK_TOKENS, dim
        return _drawn_rows(device, *shape, dtype=dtype, kv_dtype=kv_dtype)

    held, packed = memory(1024, source), memory(512, target)
    tables = torch.randperm(1024, device=device)[:512], torch.arange(512, device=device)
    arguments = held, tables[0], packed, tables[1], 0, 512 * BLOCK_TOKENS
    corner = kv_pack.Corner(0, 0) if has_digest else None

    def results(copy: Callable[..., Tensor | None]) -> Results:
        copy(*arguments, corner=corner)
        return (_plain(packed),)

    return Call(
        functools.partial(kv_pack.launch, *arguments, corner=corner),
        functools.partial(results, kv_pack.launch),
        functools.partial(results, kv_pack.reference),
    )


def attention(
    device: torch.device,
    *,
    heads: tuple[int, int, int],  # query heads, KV heads, size of a key
    value_dim: int | None = None,
    latent: bool = False,
    batch: int = 32,
    queries: int = 1,  # of each sequence
    context: int = 4096,
    splits: int = 1,  # where there is no device to choose for
    dtype: torch.dtype = BRAIN,
    kv_dtype: torch.dtype | None = None,
    window: int | None = None,
    softcap: float | None = None,
    has_sinks: bool = False,
) -> Call:
    num_heads, num_kv_heads, key_dim = heads
    value_dim = value_dim or key_dim
    num_blocks = batch * context // BLOCK_TOKENS
    shape = num_blocks, 1 if latent else 2, num_kv_heads, BLOCK_TOKENS, key_dim
    memory = _drawn_rows(device, *shape, dtype=dtype, kv_dtype=kv_dtype)
    value_row = value_dim + (SCALE_BYTES if kv_dtype and not latent else 0)
    arguments = (
        _drawn(device, batch * queries, num_heads, key_dim, dtype=dtype),
        memory[:, 0],
        memory[:, -1, ..., :value_row],
        torch.arange(num_blocks, dtype=torch.int32, device=device).view(batch, -1),
        torch.arange(batch + 1, dtype=torch.int32, device=device) * queries,
        torch.full((batch,), context, dtype=torch.int32, device=device),
        key_dim**-0.5,
    )
    sinks = _drawn(device, num_heads) if has_sinks else None
    options: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": sinks}
    num_splits = None if device.type == "cuda" else splits
    run = functools.partial(paged_attention_gpu.launch, *arguments, **options, num_splits=num_splits)
    return Call(run, lambda: (run(),), lambda: (paged_attention.reference(*arguments, **options),))


def route(device: torch.device, *, num_tokens: int = 4096, num_experts: int, has_bias: bool, **options: Any) -> Call:
    logits = _drawn(device, num_tokens, num_experts)
    options |= {"experts_per_token": 8, "scale": 2.5, "bias": _drawn(device, num_experts) if has_bias else None}
    run = functools.partial(moe_route.launch, logits, **options)
    return Call(run, run, functools.partial(moe_route.reference, logits, **options))


def experts(
    device: torch.device,
    *,
    num_tokens: int,
    num_experts: int,
    intermediate_size: int,
    hidden_size: int,
    has_bias: bool = False,
    dtype: torch.dtype = BRAIN,
    form: dict[str, Any] | None = None,  # of quantised weights, as _drawn_weight takes it
    activations: Activations = "kept",
) -> Call:
    def packed(num_outputs: int, depth: int) -> list[linear.PackedLinear]:
        bias = _drawn(device, num_outputs, dtype=dtype) if has_bias else None
        if form is None:
            weights = _drawn(device, num_experts, num_outputs, depth, dtype=dtype)
            return [linear.PackedLinear(weight, bias, num_outputs, depth, dtype) for weight in weights]
        quantised = [_drawn_weight(device, size=(num_outputs, depth), **form) for _ in range(num_experts)]
        quantised = [dataclasses.replace(weight, activations=activations) for weight in quantised]
        return [
            linear.PackedLinear(weight.codes, bias, num_outputs, depth, dtype, None, weight, None, activations)
            for weight in quantised
        ]

    experts = moe_mlp.join_experts(packed(2 * intermediate_size, hidden_size), packed(hidden_size, intermediate_size))
    expert_ids = torch.rand(num_tokens, num_experts, device=device).topk(min(4, num_experts)).indices
    weights = torch.rand(expert_ids.shape, device=device)
    x = _drawn(device, num_tokens, hidden_size, dtype=dtype)
    arguments: Any = x, experts, expert_ids, weights, "silu"
    run = functools.partial(moe_mlp.launch, *arguments)
    return Call(run, lambda: (run(),), lambda: (moe_mlp.reference(*arguments),))


def _drawn_weight(
    device: torch.device,
    *,
    size: tuple[int, int],  # outputs, inputs
    kind: Kind,
    group: int | None = None,  # None: a scale per output
    scales: torch.dtype = SINGLE,
    offsets: torch.dtype | None = None,
    has_output_scales: bool = False,
) -> QuantisedWeight:
    n, k = size
    width, num_groups = -(-k // 2) if kind in NUMBERS else k, -(-k // group) if group else 1
    if device.type == "cuda":
        codes = torch.randint(256, (n, width), dtype=torch.uint8, device=device)
        if kind == "fp8":
            codes[codes & 127 == 127] -= 1  # no NaN
    else:
        codes = torch.empty(n, width, dtype=torch.uint8)
    return QuantisedWeight(
        kind,
        codes.view(CODE_DTYPES[kind]),
        (torch.rand(n, num_groups, device=device) + 0.5).to(scales),
        k,
        group or k,
        None if offsets is None else _drawn(device, n, num_groups, dtype=offsets),
        torch.rand(n, device=device) if has_output_scales else None,
    )


def quantised(
    device: torch.device,
    *,
    num_rows: int,
    size: tuple[int, int] = (4096, 4096),
    dtype: torch.dtype = BRAIN,
    **form: Any,
) -> Call:
    """form: as _drawn_weight takes it."""
    weight, x = _drawn_weight(device, size=size, **form), _drawn(device, num_rows, size[1], dtype=dtype)
    run = functools.partial(quantised_linear.launch, x, weight)
    return Call(run, lambda: (run(),), lambda: (quantised_linear.reference(x, weight),))


def fp8(
    device: torch.device,
    *,
    num_rows: int,
    size: tuple[int, int] = (4096, 4096),
    dtype: torch.dtype = BRAIN,
    **form: Any,
) -> Call:
    """form: as _drawn_weight takes it."""
    weight, x = _drawn_weight(device, size=size, **form), _drawn(device, num_rows, size[1], dtype=dtype)
    run = functools.partial(fp8_linear.launch, x, weight)
    return Call(run, lambda: (run(),), lambda: (fp8_linear.reference(x, weight),))


def fp8_rows(device: torch.device, *, num_rows: int, size: int, dtype: torch.dtype = BRAIN) -> Call:
    x = _drawn(device, num_rows, size, dtype=dtype)

    def plain(quantise: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Results:
        codes, scales = quantise(x)
        return codes.float(), scales

    return Call(
        functools.partial(fp8_linear.quantise_launch, x),
        functools.partial(plain, fp8_linear.quantise_launch),
        functools.partial(plain, fp8_linear.quantise),
    )


def sample(device: torch.device, *, vocab: int, first_id: int = 0, dtype: torch.dtype = SINGLE) -> Call:
    """Only the keys are compared: a token at the edge of top-p may be in or out."""
    row = sampling.options_of(1.0, 50, 0.9, 0.05)
    options = torch.tensor([row] * 64, dtype=torch.float64, device=device)
    arguments = _drawn(device, 64, vocab, dtype=dtype), options, torch.arange(64, device=device), first_id
    run = functools.partial(sampling.launch, *arguments)
    return Call(run, lambda: run()[1:], lambda: sampling.reference(*arguments)[1:])
