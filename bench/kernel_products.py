"""Cases of matrix products: the experts of a mixture, and weights of four or eight bits."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cpu_kernels import FORMS as CPU_FORMS
from bench.kernel_case import Case, Goal, Peer, Run, Setting, Work
from kernels import moe_mlp, quantised_linear
from kernels.linear import PackedLinear
from kernels.quantised import QuantisedWeight, dequantise, quantise

FORMS = CPU_FORMS | {"fp8 per output": lambda weight: quantise(weight, "fp8")}


def mixture(setting: Setting, *, tokens: int, experts: int, hidden: int, width: int, per_token: int) -> Work:
    """Both products of the experts, the activation and the weighted sum, with experts chosen evenly."""
    x = setting.drawn(tokens, hidden)
    gate_up = setting.drawn(experts, 2 * width, hidden) * hidden**-0.5
    down = setting.drawn(experts, hidden, width) * width**-0.5
    packed = moe_mlp.join_experts(*(
        [PackedLinear(each, None, *each.shape, each.dtype) for each in side] for side in (gate_up, down)
    ))  # fmt: skip
    expert_ids = torch.rand(tokens, experts, device=setting.device).topk(per_token).indices
    shares = torch.rand(tokens, per_token, device=setting.device).softmax(-1)

    def grouped() -> Tensor:
        ordered, slots = expert_ids.flatten().sort(stable=True)
        ends = torch.searchsorted(ordered, torch.arange(experts, device=x.device), right=True).int()
        rows = slots // per_token
        gate, up = F.grouped_mm(x[rows], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        answers = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
        out = torch.zeros(tokens, hidden, device=x.device)
        return out.index_add_(0, rows, answers.float() * shares.flatten()[slots, None]).to(x.dtype)

    used = expert_ids.unique().numel()
    return Work(
        lambda: moe_mlp.launch(x, packed, expert_ids, shares, "silu"),
        lambda: moe_mlp.reference(x, packed, expert_ids, shares, "silu"),
        {"F.grouped_mm": Peer(lambda: grouped), "torch.compile": Peer(lambda: setting.compiled(grouped))},
        used * (gate_up[0].nbytes + down[0].nbytes) + 2 * x.nbytes,
        6.0 * tokens * per_token * hidden * width,
    )


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


def _scaled(x: Tensor, weight: QuantisedWeight) -> Run:
    """What rounds the rows to fp8 is not timed."""
    factors = x.float().abs().amax(1, keepdim=True) / 448
    rows, scales = (x / factors).to(torch.float8_e4m3fn), weight.scales.float().t().contiguous()
    columns = weight.codes.t()

    def run() -> Tensor:
        return torch._scaled_mm(rows, columns, scale_a=factors, scale_b=scales, out_dtype=torch.bfloat16)

    return run


DRY_EXPERTS = {"tokens": 5, "experts": 3, "hidden": 32, "width": 24, "per_token": 2}
QWEN3 = {"experts": 128, "hidden": 2048, "width": 768, "per_token": 8}
MIXTRAL = {"experts": 8, "hidden": 4096, "width": 14336, "per_token": 2}
CHECKED_EXPERTS = {"experts": 8, "hidden": 1024, "width": 512, "per_token": 2}
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
    Case(
        "experts, 64 decodes, 128 of 2048 x 768, top 8",
        "grouped_linear",
        mixture,
        DRY_EXPERTS,
        CHECKED_EXPERTS | {"tokens": 9},
        QWEN3 | {"tokens": 64},
        goal=Goal("share", 0.60),
    ),
    Case(
        "experts, prefill of 8192, 128 of 2048 x 768, top 8",
        "grouped_linear",
        mixture,
        DRY_EXPERTS | {"tokens": 17},
        CHECKED_EXPERTS | {"tokens": 301},
        QWEN3 | {"tokens": 8192},
        bound="product",
        goal=Goal("sheet", 0.40),
    ),
    Case(
        "experts, prefill of 8192, 8 of 4096 x 14336, top 2",
        "grouped_linear",
        mixture,
        DRY_EXPERTS | {"experts": 2},
        CHECKED_EXPERTS | {"tokens": 999},
        MIXTRAL | {"tokens": 8192},
        bound="product",
        goal=Goal("sheet", 0.40),
    ),
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
)
