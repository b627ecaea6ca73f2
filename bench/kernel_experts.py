"""Cases of a mixture of experts: the whole layer, and one product of it, the grouped GEMM, of each form of weights."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_case import Case, Goal, Peer, Run, Setting, Work
from bench.kernel_products import FORMS, fp8_rows
from kernels import grouped_fp8_linear, grouped_linear, grouped_quantised_linear, moe_mlp
from kernels.linear import PackedLinear
from kernels.quantised import Activations, QuantisedWeight, dequantise, quantise


def mixture(setting: Setting, *, tokens: int, experts: int, hidden: int, width: int, per_token: int) -> Work:
    """Both products of the experts, the activation and the weighted sum, with experts chosen evenly."""
    x = setting.drawn(tokens, hidden)
    gate_up = setting.drawn(experts, 2 * width, hidden) * hidden**-0.5
    down = setting.drawn(experts, hidden, width) * width**-0.5
    packed = moe_mlp.join_experts(*([_plain(each) for each in side] for side in (gate_up, down)))
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


def _plain(weight: Tensor) -> PackedLinear:
    return PackedLinear(weight, None, *weight.shape, weight.dtype)


def product(
    setting: Setting,
    *,
    tokens: int,
    experts: int,
    n: int,
    k: int,
    per_token: int,
    form: str = "",  # of FORMS; empty: weights of the rows' dtype
    activations: Activations = "kept",
) -> Work:
    """One product, with experts chosen evenly and rows that lie in the order of their expert: peers take no others, and
    what order, gathering and summing cost is in the mixture."""
    x = setting.drawn(tokens * per_token, k)
    weights = [_expert(setting, n, k, form, activations) for _ in range(experts)]
    group = grouped_linear.group(weights)
    assert group is not None
    expert_ids = torch.rand(tokens, experts, device=setting.device).topk(per_token).indices.flatten().sort().values
    order = grouped_linear.ordered(expert_ids[:, None], experts)
    ends = order.starts[1:].int()
    out = x.new_empty(len(x), n)
    quantised = [weight.quantised for weight in weights if weight.quantised is not None]
    if quantised:
        launch = grouped_fp8_linear.launch if activations == "fp8" else grouped_quantised_linear.launch
        peers = {"F.grouped_mm of the expanded weights": Peer(lambda: _expanded(x, quantised, ends), 0.1)}
    else:
        launch = grouped_linear.launch
        peers = {"F.grouped_mm": Peer(lambda: _grouped(x, torch.stack([weight.weight for weight in weights]), ends))}
    if activations == "fp8":
        peers["torch._scaled_grouped_mm, a scale per row and output"] = Peer(lambda: _scaled(x, quantised, ends), 0.1)

    def kernel() -> Tensor:
        launch(x, group, order, 1, out)
        return out

    used = expert_ids.unique().numel()
    return Work(
        kernel,
        lambda: grouped_linear.reference(x, weights, expert_ids[:, None], 1),
        peers,
        used * _held_bytes(weights[0]) + x.nbytes + out.nbytes,
        2.0 * len(x) * n * k,
    )


def _expert(setting: Setting, n: int, k: int, form: str, activations: Activations) -> PackedLinear:
    if not form:
        return _plain(setting.drawn(n, k) * k**-0.5)
    weight = FORMS[form](torch.randn(n, k, device=setting.device) * k**-0.5).to(setting.device)
    if activations == "fp8":
        weight = dataclasses.replace(weight, scales=weight.scales.float(), activations="fp8")
    return PackedLinear(weight.codes, None, n, k, setting.dtype, None, weight, None, activations)


def _held_bytes(weight: PackedLinear) -> int:
    tensors = (weight.weight,) if weight.quantised is None else weight.quantised.tensors()
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Run:
    """weights: [E, N, K]."""
    return lambda: F.grouped_mm(x, weights.transpose(1, 2), offs=ends)


def _expanded(x: Tensor, weights: list[QuantisedWeight], ends: Tensor) -> Run:
    """PyTorch has no grouped product of rows in bfloat16 with weights of four or eight bits, nor one of fp8 with scales
    of blocks. Rows are not rounded."""
    return _grouped(x, torch.stack([dequantise(weight).to(x.dtype) for weight in weights]), ends)


def _scaled(x: Tensor, weights: list[QuantisedWeight], ends: Tensor) -> Run:
    """Weights are rounded anew with a scale per output: it takes no others. What rounds rows and weights is not
    timed."""
    rows, factors = fp8_rows(x)
    anew = [quantise(dequantise(weight), "fp8") for weight in weights]
    codes = torch.stack([weight.codes for weight in anew]).transpose(1, 2)
    scales = torch.stack([weight.scales.flatten() for weight in anew])
    of_rows = factors.flatten()
    return lambda: torch._scaled_grouped_mm(rows, codes, of_rows, scales, offs=ends, out_dtype=torch.bfloat16)


DRY_EXPERTS = {"tokens": 5, "experts": 3, "hidden": 32, "width": 24, "per_token": 2}
QWEN3 = {"experts": 128, "hidden": 2048, "width": 768, "per_token": 8}
MIXTRAL = {"experts": 8, "hidden": 4096, "width": 14336, "per_token": 2}
CHECKED_EXPERTS = {"experts": 8, "hidden": 1024, "width": 512, "per_token": 2}
DRY_PRODUCT = {"tokens": 5, "experts": 3, "n": 48, "k": 160, "per_token": 2}
CHECKED_PRODUCT = {"experts": 8, "n": 1008, "k": 1056, "per_token": 2}  # K of whole scales of 32, not of 128
QWEN3_GATE_UP = {"experts": 128, "n": 1536, "k": 2048, "per_token": 8}
OSS_GATE_UP = {"experts": 32, "n": 5760, "k": 2880, "per_token": 4}
DEEPSEEK_GATE_UP = {"experts": 32, "n": 4096, "k": 7168, "per_token": 8}  # an eighth of V3's 256, as many rows each
DECODES, PREFILL = 64, 8192


def _product(module: str, weights: str, sizes: dict[str, int], tokens: int, **form: str) -> Case:
    """Decoding is judged by the bytes of the weights that are asked for, prefill by its arithmetic."""
    decodes = tokens == DECODES
    what = f"{tokens} decodes" if decodes else f"prefill of {tokens}"
    fp8 = form.get("activations") == "fp8"
    of_product = Goal("share" if fp8 else "sheet", 0.40)  # limits have no data sheet's peak of fp8
    return Case(
        f"grouped product, {weights}, {what}, {sizes['experts']} of {sizes['n']} x {sizes['k']}",
        module,
        product,
        DRY_PRODUCT | {"tokens": 5 if decodes else 17} | form,
        CHECKED_PRODUCT | {"tokens": 9 if decodes else 301} | form,
        sizes | {"tokens": tokens} | form,
        bound="memory" if decodes else "fp8 product" if fp8 else "product",
        goal=Goal("share", 0.60) if decodes else of_product,
    )


CASES = (
    Case(
        "experts, 64 decodes, 128 of 2048 x 768, top 8",
        "moe_mlp",
        mixture,
        DRY_EXPERTS,
        CHECKED_EXPERTS | {"tokens": 9},
        QWEN3 | {"tokens": DECODES},
        goal=Goal("share", 0.60),
    ),
    Case(
        "experts, prefill of 8192, 128 of 2048 x 768, top 8",
        "moe_mlp",
        mixture,
        DRY_EXPERTS | {"tokens": 17},
        CHECKED_EXPERTS | {"tokens": 301},
        QWEN3 | {"tokens": PREFILL},
        bound="product",
        goal=Goal("sheet", 0.40),
    ),
    Case(
        "experts, prefill of 8192, 8 of 4096 x 14336, top 2",
        "moe_mlp",
        mixture,
        DRY_EXPERTS | {"experts": 2},
        CHECKED_EXPERTS | {"tokens": 999},
        MIXTRAL | {"tokens": PREFILL},
        bound="product",
        goal=Goal("sheet", 0.40),
    ),
    *(_product("grouped_linear", "bfloat16", QWEN3_GATE_UP, tokens) for tokens in (DECODES, PREFILL)),
    *(
        _product("grouped_quantised_linear", form, sizes, tokens, form=form)
        for form, sizes in (("mxfp4", OSS_GATE_UP), ("int4 per 128", QWEN3_GATE_UP))
        for tokens in (DECODES, PREFILL)
    ),
    *(
        _product("grouped_fp8_linear", "fp8 rows and weights", sizes, tokens, form="fp8 per 128", activations="fp8")
        for sizes in (QWEN3_GATE_UP, DEEPSEEK_GATE_UP)
        for tokens in (DECODES, PREFILL)
    ),
)
