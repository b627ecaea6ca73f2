"""Experts against NumPy in float64, the plain layers that each of them is, and the blocks of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from quantised_weights import FORMS, drawn_weight
from torch import Tensor
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from kernels.cpu import library as library_module
from kernels.cpu.library import Library
from kernels.gated_activation import gated_activation
from kernels.linear import PackedLinear, linear, pack, pack_quantised
from kernels.moe_mlp import PackedExperts, join_experts, moe_mlp, pack_experts, reference
from kernels.moe_route import moe_route

Run = Callable[[Tensor, PackedExperts, Tensor, Tensor, Any], Tensor]

FORMS_OF_EXPERTS = ["dense", "int8 per 32", "int4 per 128, zero points", "fp8 per 128", "mxfp4", "dense down"]
KINDS = ["silu", "gelu_tanh", "swiglu_clamped"]
SHAPES = [(1, 1, 1, 1), (5, 33, 70, 3), (3, 64, 128, 2), (7, 42, 123, 7)]  # experts, intermediate, hidden, per token


@pytest.fixture(autouse=True)
def served_by(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(library_module, "shared_library", lambda: library)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


@dataclasses.dataclass(frozen=True)
class Weights:
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    def packed(self) -> PackedExperts:
        return pack_experts(self.gate_up, self.down, self.gate_up_bias, self.down_bias)


def drawn_weights(num_experts: int, intermediate: int, hidden: int, dtype: torch.dtype, with_bias: bool) -> Weights:
    gate_up = 2 * drawn(num_experts, 2 * intermediate, hidden, seed=1) / hidden**0.5
    down = drawn(num_experts, hidden, intermediate, seed=2) / intermediate**0.5
    biases = [
        drawn(num_experts, size, dtype=dtype, seed=3) if with_bias else None for size in (2 * intermediate, hidden)
    ]
    return Weights(gate_up.to(dtype), down.to(dtype), *biases)


def experts_of(
    form: str, num_experts: int, intermediate: int, hidden: int, dtype: torch.dtype, with_bias: bool
) -> PackedExperts:
    """In a form of weight; "dense down": gate and up are quantised, and down is not."""
    weights = drawn_weights(num_experts, intermediate, hidden, dtype, with_bias)
    dense = weights.packed()
    if form == "dense":
        return dense

    def quantised(side: tuple[PackedLinear, ...], form: str) -> list[PackedLinear]:
        return [pack_quantised(drawn_weight(FORMS[form], e.n, e.k, seed=i), dtype, e.bias) for i, e in enumerate(side)]

    if form == "dense down":
        return join_experts(quantised(dense.gate_up, "int8 per 32"), dense.down)
    return join_experts(quantised(dense.gate_up, form), quantised(dense.down, form))


def drawn_choice(num_tokens: int, per_token: int, num_experts: int, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Experts of a token differ, and about one in six is not here; expert 0 is asked for much more than the others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_tokens, num_experts, generator=generator)
    scores[:, 0] += 0.5
    expert_ids = scores.topk(per_token).indices
    expert_ids[torch.rand(num_tokens, per_token, generator=generator) < 1 / 6] = -1
    return expert_ids, torch.rand(num_tokens, per_token, generator=generator)


def activated(gate: np.ndarray, up: np.ndarray, kind: str) -> np.ndarray:
    if kind == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if kind == "gelu_tanh":
        return gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    gate, up = np.minimum(gate, 7.0), np.clip(up, -7.0, 7.0)
    return gate / (1 + np.exp(-1.702 * gate)) * (up + 1)


def expected_answers(weights: Weights, expert: int, x: np.ndarray, kind: str, rounding: float) -> np.ndarray:
    """[2, rows, hidden]: what an expert says to each row, and a bound of the error of an honest computation.

    Each of gate, up and the activation is rounded once; sums in fp32 err by 2^-24 of their terms at every addition;
    no activation is steeper than 1.13 in the gate, times what the ups give."""
    gate_up, terms = product(
        x, weights.gate_up[expert], None if weights.gate_up_bias is None else weights.gate_up_bias[expert]
    )
    gate, up = np.split(gate_up, 2, axis=1)
    gate_error, up_error = np.split(np.abs(gate_up) * rounding + terms, 2, axis=1)
    hidden = activated(gate, up, kind)
    error = 1.13 * gate_error * (np.abs(up) + 1) + np.abs(gate) * up_error + np.abs(hidden) * (rounding + 2.0**-20)
    answers, terms = product(
        hidden, weights.down[expert], None if weights.down_bias is None else weights.down_bias[expert]
    )
    return np.stack([answers, error @ np.abs(wide(weights.down[expert])).T * 1.01 + terms])


def product(x: np.ndarray, weight: Tensor, bias: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """[rows, outputs] each: the product, and the error of its sums in fp32."""
    added = 0.0 if bias is None else wide(bias)
    terms = np.abs(x) @ np.abs(wide(weight)).T + np.abs(added)
    return x @ wide(weight).T + added, terms * (x.shape[1] + 2) * 2.0**-24


@pytest.mark.parametrize("run", [reference, moe_mlp])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("one_thread")
def test_agrees_with_float64(
    run: Run, shape: tuple[int, int, int, int], kind: str, with_bias: bool, dtype: torch.dtype
) -> None:
    num_experts, intermediate, hidden, per_token = shape
    weights = drawn_weights(num_experts, intermediate, hidden, dtype, with_bias)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24
    for num_tokens in (1, 2, 41):
        x = drawn(num_tokens, hidden, dtype=dtype, seed=num_tokens)
        expert_ids, shares = drawn_choice(num_tokens, per_token, num_experts)
        out = run(x, weights.packed(), expert_ids, shares, kind)
        assert out.dtype == dtype
        value, bound = np.zeros((2, num_tokens, hidden))
        for expert in range(num_experts):
            share = wide(shares.masked_fill(expert_ids != expert, 0.0).sum(1))[:, None]
            answers = expected_answers(weights, expert, wide(x), kind, rounding)
            value, bound = np.stack([value, bound]) + share * answers
        bound += np.abs(value) * rounding + (np.abs(value) + bound) * (per_token + 2) * 2.0**-22 + 1e-30
        assert (np.abs(wide(out) - value) <= bound).all()


@pytest.mark.parametrize("form", FORMS_OF_EXPERTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_an_expert_is_a_plain_layer_bit_by_bit(form: str, kind: str, with_bias: bool, dtype: torch.dtype) -> None:
    num_experts, hidden = 4, 123
    experts = experts_of(form, num_experts, 42, hidden, dtype, with_bias)
    x = drawn(150, hidden, dtype=dtype)
    expert_ids = torch.arange(150)[:, None] % num_experts
    out = moe_mlp(x, experts, expert_ids, torch.ones(150, 1), kind)
    for expert in range(num_experts):
        plain = linear(gated_activation(linear(x, experts.gate_up[expert]), kind), experts.down[expert])
        assert plain.isfinite().all()
        assert torch.equal(out[expert::num_experts], plain[expert::num_experts])


@pytest.mark.parametrize("form", ["dense", "int4 per 128, zero points", "mxfp4"])
@pytest.mark.parametrize("shape", [(5, 33, 70, 3), (3, 64, 1024, 2)])  # 1024: rows that are moved apart
@pytest.mark.usefixtures("one_thread")
def test_a_row_has_the_same_bits_in_any_batch(form: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    num_experts, intermediate, hidden, per_token = shape
    experts = experts_of(form, num_experts, intermediate, hidden, dtype, True)
    x, (expert_ids, weights) = drawn(150, hidden, dtype=dtype), drawn_choice(150, per_token, num_experts)

    def in_chunks(size: int) -> Tensor:
        pieces = zip(x.split(size), expert_ids.split(size), weights.split(size), strict=True)
        return torch.cat([moe_mlp(rows, experts, ids, shares, "silu") for rows, ids, shares in pieces])

    alone = in_chunks(1)
    assert alone.isfinite().all()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for size in (2, 7, 13, 64, 150):
            assert torch.equal(in_chunks(size), alone)


@pytest.mark.parametrize("run", [reference, moe_mlp])
def test_what_is_not_asked_for_is_not_read(run: Run, dtype: torch.dtype) -> None:
    weights = drawn_weights(6, 33, 70, dtype, True)
    x = drawn(5, 70, dtype=dtype)
    expert_ids = torch.tensor([[0, 3], [3, -1], [-1, 5], [-1, -1], [5, 0]])
    shares = torch.rand(5, 2)
    expected = run(x, weights.packed(), expert_ids, shares, "silu")
    assert (expected[3] == 0).all()
    for tensor in (weights.gate_up, weights.down, weights.gate_up_bias, weights.down_bias):
        assert tensor is not None
        tensor[[1, 2, 4]] = float("nan")
    x[3] = float("nan")
    shares[expert_ids < 0] = float("nan")
    assert torch.equal(run(x, weights.packed(), expert_ids, shares, "silu"), expected)


@pytest.mark.parametrize("run", [reference, moe_mlp])
def test_a_row_of_nans_stays_in_its_row(run: Run, dtype: torch.dtype) -> None:
    experts, (expert_ids, shares) = drawn_weights(3, 33, 70, dtype, False).packed(), drawn_choice(9, 2, 3)
    expert_ids[4] = 0
    x = drawn(9, 70, dtype=dtype)
    clean = run(x, experts, expert_ids, shares, "silu")
    x[4] = float("nan")
    out = run(x, experts, expert_ids, shares, "silu")
    assert out[4].isnan().all()
    assert torch.equal(out[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("run", [reference, moe_mlp])
def test_answers_are_added_in_order_and_rounded_once(run: Run, dtype: torch.dtype) -> None:
    answers = torch.tensor([2.0**26, -(2.0**26), 1.0, 3.0])  # 2^26 + 1 is 2^26 in fp32, and 256 + 1 is 256 in bfloat16
    experts = pack_experts(
        torch.zeros(4, 2, 5, dtype=dtype),
        torch.zeros(4, 5, 1, dtype=dtype),
        None,
        answers[:, None].expand(4, 5).to(dtype),
    )
    expert_ids = torch.tensor([[0, 1, 2], [0, 2, 1], [2, 0, 1], [3, 2, 3]])
    weights = torch.ones(4, 3)
    weights[3] = torch.tensor([256.0, 3.0, -256.0])
    out = run(torch.ones(4, 5, dtype=dtype), experts, expert_ids, weights, "silu")
    assert out.tolist() == [[value] * 5 for value in (1.0, 0.0, 0.0, 3.0)]


@pytest.mark.parametrize("run", [reference, moe_mlp])
@pytest.mark.parametrize("outside", [-2, 4, 2**40])
def test_an_expert_out_of_range_reads_nothing(run: Run, outside: int, dtype: torch.dtype) -> None:
    experts = drawn_weights(4, 3, 6, dtype, False).packed()
    with pytest.raises(AssertionError):
        run(torch.ones(2, 6, dtype=dtype), experts, torch.tensor([[0, 1], [2, outside]]), torch.ones(2, 2), "silu")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("guarded")
def test_writes_all_of_its_output_and_nothing_beside_it(with_bias: bool, dtype: torch.dtype) -> None:
    experts = drawn_weights(5, 33, 71, dtype, with_bias).packed()
    moe_mlp(drawn(23, 71, dtype=dtype), experts, *drawn_choice(23, 3, 5), "silu")


@torch.no_grad()
def test_agrees_with_the_block_of_mixtral() -> None:
    config = MixtralConfig(hidden_size=64, intermediate_size=42, num_local_experts=8, num_experts_per_tok=2)
    block = MixtralSparseMoeBlock(config).eval()
    for index, parameter in enumerate(block.parameters()):
        parameter.copy_(drawn(*parameter.shape, seed=index) / 8)
    x = drawn(31, 64, seed=9)
    logits = x @ block.gate.weight.T
    expert_ids, weights = moe_route(logits, experts_per_token=2, scoring="softmax", normalise=True)
    experts = pack_experts(block.experts.gate_up_proj.detach(), block.experts.down_proj.detach())
    out = moe_mlp(x, experts, expert_ids, weights, "silu")
    torch.testing.assert_close(out, block(x[None])[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_agrees_with_the_experts_of_gpt_oss() -> None:
    experts = GptOssExperts(
        GptOssConfig(hidden_size=64, intermediate_size=42, num_local_experts=5, num_experts_per_tok=2)
    )
    for index, parameter in enumerate(experts.parameters()):
        parameter.copy_(drawn(*parameter.shape, seed=index))
    x, expert_ids = drawn(31, 64, seed=9), drawn(31, 5, seed=8).topk(2).indices
    weights = torch.rand(31, 2, generator=torch.Generator().manual_seed(7))

    def gates_then_ups(interleaved: Tensor) -> Tensor:
        return torch.cat([interleaved[:, ::2], interleaved[:, 1::2]], dim=1).detach()

    packed = pack_experts(
        gates_then_ups(experts.gate_up_proj.transpose(1, 2)),
        experts.down_proj.transpose(1, 2).detach(),
        gates_then_ups(experts.gate_up_proj_bias),
        experts.down_proj_bias.detach(),
    )
    out = moe_mlp(x, packed, expert_ids, weights, "swiglu_clamped")
    torch.testing.assert_close(out, experts(x, expert_ids, weights), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("served", [True, False])
def test_the_launcher_serves_with_and_without_the_library(
    monkeypatch: pytest.MonkeyPatch, served: bool, dtype: torch.dtype
) -> None:
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)
    weights = drawn_weights(4, 33, 70, dtype, True)
    assert weights.gate_up_bias is not None
    assert weights.down_bias is not None
    experts = weights.packed()
    assert (experts.library is not None) == served
    one_by_one = join_experts(
        [pack(*each) for each in zip(weights.gate_up, weights.gate_up_bias, strict=True)],
        [pack(*each) for each in zip(weights.down, weights.down_bias, strict=True)],
    )
    x, (expert_ids, shares) = drawn(9, 140, dtype=dtype)[:, ::2], drawn_choice(9, 2, 4)
    out = moe_mlp(x, experts, expert_ids, shares, "silu")
    rtol, atol = (1e-5, 1e-5) if dtype == torch.float32 else (2**-7, 2**-8)
    torch.testing.assert_close(out, reference(x, experts, expert_ids, shares, "silu"), rtol=rtol, atol=atol)
    assert torch.equal(moe_mlp(x, one_by_one, expert_ids, shares, "silu"), out)
    assert moe_mlp(x[:0], experts, expert_ids[:0], shares[:0], "silu").shape == (0, 70)


@pytest.mark.parametrize("form", [form for form in FORMS_OF_EXPERTS if form != "dense"])
def test_quantised_experts_agree_with_their_reference(
    monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype
) -> None:
    """Of rows so small that gates, whose errors are as large as the terms of their sums, are mostly not clamped."""
    x, (expert_ids, shares) = (drawn(23, 70) / 512).to(dtype), drawn_choice(23, 2, 4)
    served = experts_of(form, 4, 33, 70, dtype, True)
    assert served.library is not None
    out = moe_mlp(x, served, expert_ids, shares, "swiglu_clamped")
    monkeypatch.setattr(library_module, "shared_library", lambda: None)
    plain = experts_of(form, 4, 33, 70, dtype, True)
    assert plain.library is None
    assert plain.grouped is not None
    expected = moe_mlp(x, plain, expert_ids, shares, "swiglu_clamped")
    scale = expected.float().abs().max().item()
    torch.testing.assert_close(out, expected, rtol=0, atol=scale * (2**-18 if dtype == torch.float32 else 2**-6))


def test_what_one_launch_cannot_compute_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_module, "shared_library", lambda: None)

    def experts(*forms: str) -> PackedExperts:
        down = [pack(drawn(64, 32)) for _ in forms]
        return join_experts([pack_quantised(drawn_weight(FORMS[form], 64, 64), torch.float32) for form in forms], down)

    assert experts("int8 per output", "int8 per output").grouped is not None
    assert experts("int8 per output", "int8 per 32").grouped is None
    first, second = experts("int8 per 32", "int8 per 32").gate_up
    in_order = dataclasses.replace(second, order=torch.arange(64))
    assert join_experts([first, in_order], [pack(drawn(64, 32))] * 2).grouped is None
