"""The kernels of this machine's device against their references."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.gpu_report import Report
from kernels import gated_activation, moe_mlp, moe_route, paged_attention, rms_norm, rope_kv_write


def check_kernels(report: Report, device: torch.device) -> None:
    """Greatest difference from the reference, relative to the greatest number of it. bfloat16 rounds at 0.4 %."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    def compare(name: str, run: Callable[[Any], tuple[Tensor, ...]], kernel: Any, reference: Any) -> None:
        def part() -> None:
            worst = 0.0
            for found, expected in zip(run(kernel), run(reference), strict=True):
                scale = expected.float().abs().max().clamp(min=1e-30)
                worst = max(worst, float((found.float() - expected.float()).abs().max() / scale))
            report.add(f"kernel {name}, greatest difference", worst, "", worst / 0.02, "0.02")
            if not worst <= 0.02:
                raise ArithmeticError(f"{name} is {worst:.3g} off its reference")

        report.attempt(f"kernel {name}", part)

    x, weight, residual = drawn(123, 4096), drawn(4096), drawn(123, 4096)
    compare("rms_norm", lambda f: f(x, weight, 1e-5, residual), rms_norm.rms_norm, rms_norm.reference)
    gate_up = drawn(123, 2 * 14336)
    compare(
        "gated_activation",
        lambda f: (f(gate_up, "silu"),),
        gated_activation.gated_activation,
        gated_activation.reference,
    )

    lengths, counts, block_tokens = (1023, 17, 300, 2048), (1, 1, 100, 513), 16
    width = -(-max(lengths) // block_tokens)
    num_blocks = len(lengths) * width
    blocks = drawn(num_blocks, 2, 8, block_tokens, 128)
    tables = torch.randperm(num_blocks, device=device).int().view(len(lengths), width)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=device)

    def attend(chosen: list[int]) -> Callable[[Any], tuple[Tensor, ...]]:
        starts = torch.tensor(
            [0, *(sum(counts[s] for s in chosen[: i + 1]) for i in range(len(chosen)))], device=device
        )
        queries = drawn(int(starts[-1]), 32, 128)
        return lambda f: (
            f(queries, blocks[:, 0], blocks[:, 1], tables[chosen], starts.int(), contexts[chosen], 128**-0.5),
        )

    attention = paged_attention.paged_attention
    compare("paged_attention, decodes", attend([0, 1]), attention, paged_attention.reference)
    compare("paged_attention, mixed", attend([0, 1, 2, 3]), attention, paged_attention.reference)

    qkv, cos, sin = drawn(37, 48 * 128), torch.rand(64, 64, device=device), torch.rand(64, 64, device=device)
    positions, slots = torch.arange(37, device=device), torch.randperm(num_blocks * block_tokens, device=device)[:37]

    def turn(f: Any) -> tuple[Tensor, ...]:
        written = torch.zeros_like(blocks)
        queries = f(qkv, cos, sin, positions, slots, written[:, 0], written[:, 1], 32)
        return queries.flatten(1), written

    compare("rope_kv_write", turn, rope_kv_write.rope_kv_write, rope_kv_write.reference)

    experts = moe_mlp.pack_experts(drawn(8, 2 * 512, 1024) / 32, drawn(8, 1024, 512) / 32)
    rows, logits = drawn(61, 1024), torch.randn(61, 8, device=device)
    options: dict[str, Any] = {"experts_per_token": 2, "scoring": "softmax", "normalise": True}
    compare(
        "moe_route",
        lambda f: tuple(each.float() for each in f(logits, **options)),
        moe_route.moe_route,
        lambda *inputs, **named: moe_route.reference(*inputs, **named),
    )
    ids, shares = moe_route.reference(logits, **options)
    compare("moe_mlp", lambda f: (f(rows, experts, ids, shares, "silu"),), moe_mlp.moe_mlp, moe_mlp.reference)
