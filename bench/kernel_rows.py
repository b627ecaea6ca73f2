"""Cases of what reads and writes rows and computes little: norm, activation, rope and KV write, gathers of KV."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_case import Case, Goal, Outputs, Peer, Run, Setting, Work, relative_difference
from kernels import gated_activation, kv_pack, rms_norm, rope_kv_write
from kernels.kv_rows import LARGEST_CODE, SCALE_BYTES, dequantise_rows

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


def pack(
    setting: Setting,
    *,
    num_blocks: int,
    chosen: int,
    layers: int,
    some: int,
    kv_heads: int,
    dim: int,
    target: torch.dtype | None = None,
    has_digest: bool = True,
    is_back: bool = False,
) -> Work:
    """What a hand-over takes from the KV memory: `some` layers of scattered blocks, side by side. Or the way back."""
    row = dim if target is None else dim + SCALE_BYTES
    held = setting.drawn(num_blocks, layers, 2, kv_heads, BLOCK_TOKENS, dim)
    table, side_by_side = torch.randperm(num_blocks, device=setting.device)[:chosen], torch.arange(chosen)
    tables = table, side_by_side.to(setting.device)
    first = (layers - some) // 2
    part = held[:, first : first + some]
    corner = kv_pack.Corner(first, 0) if has_digest else None

    def copier(copy: Callable[..., Tensor | None]) -> Run:
        if is_back:
            ends = part[:chosen].clone(), tables[1], torch.zeros_like(held)[:, first : first + some], tables[0]
        else:
            packed = torch.zeros(chosen, some, 2, kv_heads, BLOCK_TOKENS, row, device=setting.device)
            ends = part, tables[0], packed.to(target or setting.dtype), tables[1]

        def run() -> Outputs:
            sums = copy(*ends, 0, chosen * BLOCK_TOKENS, corner=corner)
            return ends[2] if sums is None else (ends[2], sums)

        return run

    written = chosen * some * 2 * kv_heads * BLOCK_TOKENS
    landing = held.new_empty(chosen, some, 2, kv_heads, BLOCK_TOKENS, dim)
    peers = {
        "index_select": Peer(lambda: lambda: torch.index_select(part, 0, table, out=landing), None),
        "copy_ of as much": Peer(lambda: lambda: landing.copy_(part[:chosen]), None),
    }
    return Work(
        copier(kv_pack.launch),
        copier(kv_pack.reference),
        peers,
        written * (dim * setting.dtype.itemsize + row * (target or setting.dtype).itemsize),
        difference=_packed_difference,
    )


def _packed_difference(found: Outputs, expected: Outputs) -> float:
    """Sums are the same, or wrong; but rows of codes may round otherwise, and their sums with them."""
    if isinstance(found, Tensor) or isinstance(expected, Tensor):
        return relative_difference(found, expected)
    if found[0].dtype in LARGEST_CODE:
        return relative_difference(dequantise_rows(found[0]), dequantise_rows(expected[0]))
    return relative_difference(found[0], expected[0]) if torch.equal(found[1], expected[1]) else float("inf")


ROWS = {"rows": 123, "width": 4096}
HEADS = {"heads": 32, "kv_heads": 8, "dim": 128}
BLOCKS = {"num_blocks": 9, "chosen": 2, "layers": 3, "kv_heads": 1, "dim": 8}
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
    *(
        Case(
            name,
            "kv_pack",
            pack,
            BLOCKS | {"some": 1} | options,
            CHECKED_BLOCKS | {"some": 8} | options,
            FULL_BLOCKS | {"some": 32} | options,
            goal=Goal("share", 0.80),
        )
        for name, options in (
            ("pack: 512 blocks of 32 layers, digested", {}),
            ("pack: the same without a digest", {"has_digest": False}),
            ("pack: the same into int8, digested", {"target": torch.int8}),
            ("pack: the same into fp8, digested", {"target": torch.float8_e4m3fn}),
            ("unpack: 512 blocks of 32 layers, digested", {"is_back": True}),
        )
    ),
    Case(
        "pack: 512 blocks, 4 of 32 layers, digested",
        "kv_pack",
        pack,
        BLOCKS | {"some": 1},
        CHECKED_BLOCKS | {"some": 3},
        FULL_BLOCKS | {"some": 4},
        goal=Goal("share", 0.80),
    ),
)
