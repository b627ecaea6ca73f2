"""Cases of matrix products with weights of four or eight bits, and with rows of eight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu_kernels import FORMS as CPU_FORMS
from bench.kernel_case import Case, Goal, Peer, Run, Setting, Work
from kernels import fp8_linear, quantised_linear
from kernels.quantised import QuantisedWeight, dequantise, quantise

FORMS = CPU_FORMS | {"fp8 per output": lambda weight: quantise(weight, "fp8")}


def quantised(setting: Setting, *, form: str, rows: int, n: int, k: int) -> Work:
    """Few rows, by the kernel; many, by slices in their own dtype and the vendor's product."""
    x = setting.drawn(rows, k)
    weight = FORMS[form](torch.randn(n, k, device=setting.device) * k**-0.5).to(setting.device)
    peers = {"F.linear of the expanded weight": Peer(lambda: _expanded(x, weight))}
    if form == "int4 per 128":
        peers["torch._weight_int4pack_mm"] = Peer(lambda: _int4pack(x, weight))
    if form == "fp8 per output":
        peers["torch._scaled_mm of fp8 rows"] = Peer(lambda: _scaled(x, weight), 0.1)  # rows are rounded, too
    few = rows <= quantised_linear.FEW_ROWS
    run: Callable[..., Tensor] = quantised_linear.launch if few else quantised_linear.quantised_linear
    held = sum(tensor.nbytes for tensor in weight.tensors() if tensor is not None)
    return Work(
        lambda: run(x, weight),
        lambda: quantised_linear.reference(x, weight),
        peers,
        held + x.nbytes + rows * n * x.element_size(),
        2.0 * rows * n * k,
    )


def _expanded(x: Tensor, weight: QuantisedWeight) -> Run:
    values = dequantise(weight).to(x.dtype)
    return lambda: F.linear(x, values)


def _int4pack(x: Tensor, weight: QuantisedWeight) -> Run:
    """Its bytes have an even k in the high half, and its zero points are those of numbers around 8, as ours are."""
    swapped = weight.codes >> 4 | weight.codes << 4
    packed = torch.ops.aten._convert_weight_to_int4pack(swapped, 8)
    scales = weight.scales.to(x.dtype).t()
    factors = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, weight.group, factors)


def of_fp8_rows(setting: Setting, *, form: str, rows: int, n: int, k: int) -> Work:
    """Rows are rounded by the kernel, in its time; those of peers before."""
    x = setting.drawn(rows, k)
    weight = FORMS[form](torch.randn(n, k, device=setting.device) * k**-0.5).to(setting.device)
    weight = dataclasses.replace(weight, scales=weight.scales.float(), activations="fp8")
    return Work(
        lambda: fp8_linear.launch(x, weight),
        lambda: fp8_linear.reference(x, weight),
        {
            "F.linear of the expanded weight": Peer(lambda: _expanded(x, weight), 0.1),  # rows are not rounded
            "F.scaled_mm with the same scales": Peer(lambda: _scaled_blocks(x, weight)),
            "torch._scaled_mm, a scale per row and output": Peer(lambda: _scaled_anew(x, weight), 0.1),
        },
        weight.codes.nbytes + weight.scales.nbytes + x.nbytes + rows * n * x.element_size(),
        2.0 * rows * n * k,
    )


def _scaled_blocks(x: Tensor, weight: QuantisedWeight) -> Run:
    """Scales [T, K / 128] and [N, K / 128] whose columns lie together, as it takes them; on Hopper alone."""
    blocks = F.ScalingType.BlockWise1x128
    rows, factors = fp8_linear.quantise(x)
    factors, scales = factors.t().contiguous().t(), weight.scales.t().contiguous().t()
    columns = weight.codes.t()
    return lambda: F.scaled_mm(rows, columns, factors, blocks, scales, blocks, output_dtype=torch.bfloat16)


def _scaled_anew(x: Tensor, weight: QuantisedWeight) -> Run:
    """Of a weight that is rounded anew with a scale per output."""
    return _scaled(x, quantise(dequantise(weight), "fp8"))


def _scaled(x: Tensor, weight: QuantisedWeight) -> Run:
    """What rounds the rows to fp8 is not timed."""
    rows, factors = fp8_rows(x)
    columns, scales = weight.codes.t(), weight.scales.float().t().contiguous()

    def run() -> Tensor:
        return torch._scaled_mm(rows, columns, scale_a=factors, scale_b=scales, out_dtype=torch.bfloat16)

    return run


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, K]. Its codes, and a scale for each row: [T, 1] float32."""
    factors = x.float().abs().amax(1, keepdim=True) / 448
    return (x / factors).to(torch.float8_e4m3fn), factors


DRY_WEIGHT = {"rows": 3, "n": 48, "k": 128}
CHECKED_WEIGHT = {"rows": 13, "n": 1024, "k": 1024}
FULL_WEIGHT = {"rows": 16, "n": 14336, "k": 4096}


def _few_rows(form: str) -> Case:
    return Case(
        f"{form}, 16 rows, 14336 x 4096",
        "quantised_linear",
        quantised,
        DRY_WEIGHT | {"form": form},
        CHECKED_WEIGHT | {"form": form},
        FULL_WEIGHT | {"form": form},
        goal=Goal("share", 0.60, 0.75),
    )


CASES = (
    _few_rows("int4 per 128"),
    _few_rows("int8 per output"),
    _few_rows("fp8 per output"),
    _few_rows("fp8 per 128"),
    _few_rows("mxfp4"),
    Case(
        "fp8 per output, prefill of 8192, 14336 x 4096",
        None,
        quantised,
        DRY_WEIGHT | {"rows": 65, "form": "fp8 per output"},
        CHECKED_WEIGHT | {"rows": 123, "form": "fp8 per output"},
        FULL_WEIGHT | {"rows": 8192, "form": "fp8 per output"},
        bound="product",
    ),
    Case(
        "fp8 rows and weights, 16 rows, 14336 x 4096",
        "fp8_linear",
        of_fp8_rows,
        DRY_WEIGHT | {"k": 160, "form": "fp8 per 128"},
        CHECKED_WEIGHT | {"form": "fp8 per 128"},
        FULL_WEIGHT | {"form": "fp8 per 128"},
        goal=Goal("share", 0.60, 0.75),
    ),
    Case(
        "fp8 rows and weights, prefill of 8192, 14336 x 4096",
        "fp8_linear",
        of_fp8_rows,
        DRY_WEIGHT | {"rows": 17, "k": 160, "form": "fp8 per 128"},
        CHECKED_WEIGHT | {"rows": 123, "form": "fp8 per 128"},
        FULL_WEIGHT | {"rows": 8192, "form": "fp8 per 128"},
        bound="fp8 product",
        goal=Goal("share", 0.40),
    ),
)
