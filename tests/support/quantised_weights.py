"""Quantised weights with every code that their kind has, in the forms that files bring."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from kernels.quantised import NUMBERS, Kind, QuantisedWeight, dequantise

ROW = 1 << 20  # a group longer than any K here: one scale per output


@dataclasses.dataclass(frozen=True)
class Form:
    kind: Kind
    group: int
    scales: torch.dtype
    offsets: torch.dtype | None = None
    output_scales: bool = False


FORMS = {
    "int8 per output": Form("int8", ROW, torch.float32),
    "int8 per 32": Form("int8", 32, torch.float16),  # Q8_0
    "int4 per 32": Form("int4", 32, torch.float16),  # Q4_0
    "int4 per 128, zero points": Form("int4", 128, torch.bfloat16, torch.float32),  # GPTQ, AWQ
    "int4 per 64, zero points in half": Form("int4", 64, torch.float16, torch.float16),
    "fp8 per output": Form("fp8", ROW, torch.float32),
    "fp8 per 128": Form("fp8", 128, torch.float32),  # DeepSeek
    "fp8 per 8, everything": Form("fp8", 8, torch.bfloat16, torch.bfloat16, True),
    "mxfp4": Form("fp4", 32, torch.float8_e8m0fnu),
    "nvfp4": Form("fp4", 16, torch.float8_e4m3fn, None, True),
}


def drawn_weight(form: Form, n: int, k: int, seed: int = 0) -> QuantisedWeight:
    """Codes from the whole range, but for the NaN of fp8; scales over six octaves, some of them negative."""
    random = torch.Generator().manual_seed(seed)
    groups = (n, -(-k // form.group))
    width = -(-k // 2) if form.kind in NUMBERS else k
    codes = torch.randint(256, (n, width), generator=random, dtype=torch.uint8)
    if form.kind == "fp8":
        codes[codes & 127 == 127] -= 1
    codes = codes.view({"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(form.kind, torch.uint8))
    octaves = torch.randint(-3, 4, groups, generator=random).float()
    scales = torch.exp2(octaves)
    if form.scales != torch.float8_e8m0fnu:
        scales = scales * torch.randn(groups, generator=random)
    offsets = None if form.offsets is None else torch.randn(groups, generator=random).to(form.offsets)
    output_scales = torch.rand(n, generator=random) + 0.5 if form.output_scales else None
    return QuantisedWeight(form.kind, codes, scales.to(form.scales), k, form.group, offsets, output_scales)


def magnitudes(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """[T, N] float64: the sum of the magnitudes of all that a product adds up, offsets apart from what they move."""
    plain = QuantisedWeight(weight.kind, weight.codes, weight.scales, weight.k, weight.group)
    values = dequantise(plain).double().abs()
    if weight.offsets is not None:
        repeats = min(weight.group, weight.k)
        values += weight.offsets.double().abs().repeat_interleave(repeats, 1)[:, : weight.k]
    if weight.output_scales is not None:
        values *= weight.output_scales.double()[:, None]
    return x.double().abs() @ values.T


def numbers_by_definition(kind: Kind) -> Tensor:
    """[number of codes] float64, from the definitions of the formats: sign, exponent, fraction, bias."""

    def minifloat(code: int, exponent_bits: int, fraction_bits: int, bias: int) -> float:
        sign = -1.0 if code >> (exponent_bits + fraction_bits) else 1.0
        exponent = code >> fraction_bits & ((1 << exponent_bits) - 1)
        fraction = (code & ((1 << fraction_bits) - 1)) / (1 << fraction_bits)
        if exponent == 0:
            return sign * fraction * 2.0 ** (1 - bias)
        return sign * (1 + fraction) * 2.0 ** (exponent - bias)

    if kind == "int4":
        return torch.arange(-8.0, 8.0, dtype=torch.float64)
    if kind == "int8":
        return torch.arange(256, dtype=torch.uint8).view(torch.int8).double()
    if kind == "fp4":
        return torch.tensor([minifloat(code, 2, 1, 1) for code in range(16)], dtype=torch.float64)
    numbers = torch.tensor([minifloat(code, 4, 3, 7) for code in range(256)], dtype=torch.float64)
    numbers[[127, 255]] = float("nan")
    return numbers
