"""Cases of what reads and writes rows and computes little: norm, activation, rope and KV write, gathers of KV."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_case import Case, Goal, Outputs, Peer, Run, Setting, Work, relative_difference
from kernels import gated_activation, rms_norm, rope_kv_write
from kernels.kv_rows import SCALE_BYTES, dequantise_rows

EPS = 1e-5
BLOCK_TOKENS = 16


def norm(setting: Setting, *, rows: int, width: int, has_residual: bool) -> Work:
    x, weight = setting.drawn(rows, width), setting.drawn(width)
    residual = setting.drawn(rows, width) if has_residual else None

    def in_torch() -> Outputs:
        stream = x if residual is None else x + residual
        return F.rms_norm(stream, (width,), weight, EPS), stream

    def flashinfer() -> Run:
        from flashinfer.norm import fused_add_rmsnorm, rmsnorm

        if residual is None:
            return lambda: (rmsnorm(x, weight, EPS), x)
        normed, stream = x.clone(), residual.clone()  # in place: the stream grows from call to call

        def run() -> Outputs:
            fused_add_rmsnorm(normed, stream, weight, EPS)
            return normed, stream

        return run

    what = "x + residual, F.rms_norm" if has_residual else "F.rms_norm"
    return Work(
        lambda: rms_norm.launch(x, weight, EPS, residual),
        lambda: rms_norm.reference(x, weight, EPS, residual),
        # The fused one works on what it was given: only its first call computes what is asked for.
        {
            what: Peer(lambda: in_torch),
            "torch.compile": Peer(lambda: setting.compiled(in_torch)),
            "FlashInfer": Peer(flashinfer),
        },
        x.nbytes * (4 if has_residual else 2) + weight.nbytes,
    )


def activation(setting: Setting, *, rows: int, width: int) -> Work:
    gate_up = setting.drawn(rows, 2 * width)

    def in_torch() -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def flashinfer() -> Run:
        from flashinfer.activation import silu_and_mul

        return lambda: silu_and_mul(gate_up)

    return Work(
        lambda: gated_activation.launch(gate_up, "silu"),
        lambda: gated_activation.reference(gate_up, "silu"),
        {
            "F.silu · up": Peer(lambda: in_torch),
            "torch.compile": Peer(lambda: setting.compiled(in_torch)),
            "FlashInfer": Peer(flashinfer),
        },
        1.5 * gate_up.nbytes,
    )


def rope(
    setting: Setting, *, tokens: int, heads: int, kv_heads: int, dim: int, kv_dtype: torch.dtype | None = None
) -> Work:
    dtype = kv_dtype or setting.dtype
    row = dim if kv_dtype is None else dim + SCALE_BYTES
    num_blocks = -(-tokens // BLOCK_TOKENS) + 3
    qkv, positions = setting.drawn(tokens, (heads + 2 * kv_heads) * dim), torch.arange(tokens, device=setting.device)
    angles = torch.rand(2, tokens, dim // 2, device=setting.device)
    slots = torch.randperm(num_blocks * BLOCK_TOKENS, device=setting.device)[:tokens]

    def writer(function: Any) -> Run:
        size = (num_blocks, 2, kv_heads, BLOCK_TOKENS, row * dtype.itemsize)
        blocks = torch.zeros(size, dtype=torch.uint8, device=setting.device).view(dtype)

        def run() -> Outputs:
            queries = function(qkv, *angles, positions, slots, blocks[:, 0], blocks[:, 1], heads)
            return queries, blocks

        return run

    def difference(found: Outputs, expected: Outputs) -> float:
        return relative_difference(*((each[0], dequantise_rows(each[1])) for each in (found, expected)))

    written = 2 * tokens * kv_heads * row * dtype.itemsize
    return Work(
        writer(rope_kv_write.launch),
        writer(rope_kv_write.reference),
        {"torch.compile": Peer(lambda: writer(setting.compiled(rope_kv_write.reference)))},
        qkv.nbytes + angles.nbytes + positions.nbytes + slots.nbytes + tokens * heads * dim * 2 + written,
        difference=relative_difference if kv_dtype is None else difference,
    )


def gather(setting: Setting, *, num_blocks: int, chosen: int, layers: int, some: int, kv_heads: int, dim: int) -> Work:
    """What a hand-over takes from the KV memory: `some` layers of scattered blocks, to lie together."""
    memory = setting.drawn(num_blocks, layers, 2, kv_heads, BLOCK_TOKENS, dim)
    index = torch.randperm(num_blocks, device=setting.device)[:chosen]
    first = (layers - some) // 2
    landing = memory.new_empty(chosen, some, 2, kv_heads, BLOCK_TOKENS, dim)
    part = memory[:, first : first + some]
    return Work(
        lambda: torch.index_select(part, 0, index, out=landing),
        lambda: part[index],
        {"copy_ of as much": Peer(lambda: lambda: landing.copy_(part[:chosen]), None)},
        2 * landing.nbytes,
    )


def scatter(setting: Setting, *, num_blocks: int, chosen: int, layers: int, kv_heads: int, dim: int) -> Work:
    """The way back: whole blocks that lie together, to scattered ones."""
    memory = torch.zeros(num_blocks, layers, 2, kv_heads, BLOCK_TOKENS, dim, dtype=setting.dtype, device=setting.device)
    index = torch.randperm(num_blocks, device=setting.device)[:chosen]
    landed = setting.drawn(chosen, *memory.shape[1:])

    def reference() -> Tensor:
        expected = torch.zeros_like(memory)
        expected[index] = landed
        return expected

    return Work(
        lambda: memory.index_copy_(0, index, landed),
        reference,
        {"copy_ of as much": Peer(lambda: lambda: memory[:chosen].copy_(landed), None)},
        2 * landed.nbytes,
    )


ROWS = {"rows": 123, "width": 4096}
HEADS = {"heads": 32, "kv_heads": 8, "dim": 128}
BLOCKS = {"num_blocks": 9, "chosen": 4, "layers": 3, "kv_heads": 2, "dim": 8}
CHECKED_BLOCKS = {"num_blocks": 99, "chosen": 37, "layers": 8, "kv_heads": 8, "dim": 128}
FULL_BLOCKS = {"num_blocks": 1024, "chosen": 512, "layers": 32, "kv_heads": 8, "dim": 128}
MOST = Goal("share", 0.85)

CASES = (
    Case(
        "norm with residual, 8192 x 4096",
        "rms_norm",
        norm,
        {"rows": 3, "width": 70, "has_residual": True},
        ROWS | {"has_residual": True},
        {"rows": 8192, "width": 4096, "has_residual": True},
        goal=MOST,
    ),
    Case(
        "norm, 8192 x 4096",
        "rms_norm",
        norm,
        {"rows": 3, "width": 70, "has_residual": False},
        ROWS | {"has_residual": False},
        {"rows": 8192, "width": 4096, "has_residual": False},
        goal=MOST,
    ),
    Case(
        "silu · up, 8192 x 14336",
        "gated_activation",
        activation,
        {"rows": 3, "width": 70},
        {"rows": 123, "width": 14336},
        {"rows": 8192, "width": 14336},
        goal=MOST,
    ),
    Case(
        "rope and KV write, 8192 tokens",
        "rope_kv_write",
        rope,
        {"tokens": 5, "heads": 4, "kv_heads": 2, "dim": 16},
        {"tokens": 123, **HEADS},
        {"tokens": 8192, **HEADS},
        goal=MOST,
    ),
    Case(
        "rope and int8 KV write, 8192 tokens",
        "rope_kv_write",
        rope,
        {"tokens": 5, "heads": 4, "kv_heads": 2, "dim": 16, "kv_dtype": torch.int8},
        {"tokens": 123, **HEADS, "kv_dtype": torch.int8},
        {"tokens": 8192, **HEADS, "kv_dtype": torch.int8},
        goal=MOST,
    ),
    Case(
        "pack: 512 blocks of 32 layers",
        None,
        gather,
        BLOCKS | {"some": 3},
        CHECKED_BLOCKS | {"some": 8},
        FULL_BLOCKS | {"some": 32},
        goal=Goal("share", 0.80),
    ),
    Case(
        "pack: 512 blocks, 4 of 32 layers",
        None,
        gather,
        BLOCKS | {"some": 1},
        CHECKED_BLOCKS | {"some": 3},
        FULL_BLOCKS | {"some": 4},
        goal=Goal("share", 0.80),
    ),
    Case(
        "unpack: 512 blocks of 32 layers",
        None,
        scatter,
        BLOCKS,
        CHECKED_BLOCKS,
        FULL_BLOCKS,
        goal=Goal("share", 0.80),
    ),
)
