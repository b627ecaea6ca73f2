"""Rows that are rounded to FP8 against their definition in float64, and the products of such rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from quantised_weights import FORMS, drawn_weight, numbers_by_definition
from torch import Tensor

from kernels import fp8_linear
from kernels.cpu import library as library_module
from kernels.linear import linear, pack_quantised
from kernels.linear import reference as linear_reference
from kernels.moe_mlp import join_experts, moe_mlp
from kernels.moe_mlp import reference as moe_reference
from kernels.quantised import dequantise


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_by_definition(x: np.ndarray) -> np.ndarray:
    """[K] -> [K]: the nearest multiple of a power of two that is a number of E4M3, of equally near ones the even."""
    numbers = numbers_by_definition("fp8").numpy()
    numbers = numbers[np.isfinite(numbers)]
    out = np.zeros_like(x)
    for first in range(0, len(x), 128):
        block = x[first : first + 128]
        greatest = np.abs(block).max()
        scale = 2.0 ** max(np.ceil(np.log2(greatest / 448)) if greatest else -126, -126)
        distances = np.abs(block[:, None] / scale - numbers)
        even = np.arange(256)[np.isfinite(numbers_by_definition("fp8").numpy())] % 2  # of codes whose last bit is 0
        nearest = np.lexsort((np.broadcast_to(even, distances.shape), distances), axis=1)[:, 0]
        out[first : first + 128] = numbers[nearest] * scale
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 123, 128, 300])
def test_rows_are_rounded_as_defined(k: int, dtype: torch.dtype) -> None:
    x = (drawn(5, k) * torch.tensor([1e-7, 1.0, 300.0, 3e4, 0.0])[:, None]).clamp(-6e4, 6e4).to(dtype)
    found = fp8_linear.rounded(x)
    assert found.dtype == dtype
    assert np.array_equal(found.double().numpy(), np.stack([rounded_by_definition(row) for row in x.double().numpy()]))


def test_a_rounded_row_stays_as_it_is() -> None:
    x = drawn(9, 300).bfloat16()
    once = fp8_linear.rounded(x)
    assert torch.equal(fp8_linear.rounded(once), once)
    error = (once.float() - x.float()).abs()
    assert (error <= x.float().abs() / 16 + x.float().abs().amax() * 2**-17).all()
    assert error.any()


def test_what_is_not_finite_stays_in_its_block() -> None:
    x = drawn(3, 300)
    x[0, 130], x[1, 299] = float("inf"), float("nan")
    finite = torch.ones(3, 300, dtype=torch.bool)
    finite[0, 128:256] = finite[1, 256:] = False
    assert torch.equal(fp8_linear.rounded(x).isfinite(), finite)


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("form", ["fp8 per output", "fp8 per 128"])
def test_a_product_is_that_of_rounded_rows(form: str, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)
    weight, x, bias = drawn_weight(FORMS[form], 70, 300), drawn(19, 300), drawn(70, seed=1)
    packed = pack_quantised(dataclasses.replace(weight, activations="fp8"), torch.float32, bias)
    rows = np.stack([rounded_by_definition(row) for row in x.double().numpy()])
    exact = rows @ dequantise(weight).double().numpy().T + bias.double().numpy()
    terms = np.abs(rows) @ np.abs(dequantise(weight).double().numpy()).T + 1
    for run in (linear, linear_reference):
        assert (np.abs(run(x, packed).double().numpy() - exact) <= terms * 304 * 2.0**-24).all()
    kept = dataclasses.replace(packed, activations="kept")
    assert not torch.allclose(linear(x, kept), linear(x, packed), rtol=1e-3)


@pytest.mark.parametrize("served", [True, False])
def test_experts_round_what_goes_into_both_products(served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)

    def packed(n: int, k: int) -> list:
        weights = [drawn_weight(FORMS["fp8 per 128"], n, k, seed) for seed in range(3)]
        return [pack_quantised(dataclasses.replace(weight, activations="fp8"), torch.float32) for weight in weights]

    gate_up, down = packed(66, 140), packed(140, 33)
    experts, x = join_experts(gate_up, down), drawn(12, 140) / 4096
    assert (experts.library is not None) == served
    expert_ids, shares = torch.arange(12)[:, None] % 3, torch.ones(12, 1)
    for run in (moe_mlp, moe_reference):
        out = run(x, experts, expert_ids, shares, "silu")
        for expert in range(3):
            gate, up = linear(x[expert::3], gate_up[expert]).chunk(2, dim=1)
            expected = linear(torch.nn.functional.silu(gate) * up, down[expert])
            torch.testing.assert_close(out[expert::3], expected, rtol=0, atol=2e-2 * expected.abs().max().item())
            assert expected.any()
