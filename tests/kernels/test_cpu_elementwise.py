"""RMSNorm and the gate against NumPy in float64."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.gated_activation import ActivationKind, reference

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
ROWS = [1, 2, 3, 7, 16, 123]
KINDS = get_args(ActivationKind)


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def assert_rounded(got: Tensor, expected: np.ndarray, size: np.ndarray | float = 0.0) -> None:
    """Within one rounding of the exact result; `size` is of the terms that cancelled in fp32."""
    bound = np.abs(expected) * (ROUNDING[got.dtype] * 1.01 + 2**-21) + size * 2**-22 + 1e-38
    assert (np.abs(wide(got) - expected) <= bound).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 6, 64, 577])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.usefixtures("guarded", "one_thread")
def test_rms_norm(library: Library, dtype: torch.dtype, rows: int, size: int, offset: float) -> None:
    x, residual = drawn(rows, size, dtype=dtype), drawn(rows, size, dtype=dtype, seed=1)
    weight = drawn(size, dtype=dtype, seed=2)
    for added in (None, residual):
        normed, stream = library.rms_norm(x, weight, 1e-5, added, offset=offset)
        expected_stream = x if added is None else x + added
        assert torch.equal(stream, expected_stream)
        rows64 = wide(expected_stream)
        scale = 1 / np.sqrt((rows64**2).mean(-1, keepdims=True) + 1e-5)
        assert_rounded(normed, (offset + wide(weight)) * rows64 * scale, np.abs(rows64 * scale) * offset)


def gated(gate_up: np.ndarray, kind: ActivationKind) -> tuple[np.ndarray, np.ndarray]:
    """In float64; and how far it moves for a relative error of 1 in what is rounded before the end."""
    gate, up = np.split(gate_up, 2, axis=-1)
    if kind == "silu":
        steep = gate
    elif kind == "gelu_tanh":
        steep = 2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
        half = gate * (1 + np.tanh(steep / 2)) / 2
        np.testing.assert_allclose(gate / (1 + np.exp(-steep)), half, rtol=1e-9, atol=1e-12)  # the published form
    else:
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
        steep = 1.702 * gate
    sigmoid = 1 / (1 + np.exp(-steep))
    moves = np.abs(gate) * (np.abs(up * steep) + 8) * sigmoid
    return gate * sigmoid * up, moves + np.abs(gate * up) * 2**-104  # the kernels' σ is never below 2^-127


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 6, 64, 431])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("guarded", "one_thread")
def test_gated_activation(library: Library, dtype: torch.dtype, rows: int, size: int, kind: ActivationKind) -> None:
    gate_up = drawn(rows, 2 * size, dtype=dtype) * 5
    expected, moves = gated(wide(gate_up), kind)
    assert_rounded(library.gated_activation(gate_up, kind), expected, moves)


def test_silu_at_the_ends(library: Library) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30])
    out = library.gated_activation(torch.cat((gate, torch.ones(6)))[None], "silu")[0]
    assert out[:2].abs().max() < 1e-8 * 1e30
    assert out[1].abs() < 1e-35
    assert torch.equal(out[3:], gate[3:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_stays_one(library: Library, kind: ActivationKind) -> None:
    nan = float("nan")
    gate_up = torch.tensor([[nan, 1.0, 2.0, nan]])
    assert library.gated_activation(gate_up, kind).isnan().all()
    assert reference(gate_up, kind).isnan().all()


def test_a_clamped_swiglu_at_its_limits(library: Library) -> None:
    limits = library.gated_activation(torch.tensor([[7.0, 7.0, 7.0, 7.0, -7.0, 7.0]]), "swiglu_clamped")
    beyond = library.gated_activation(torch.tensor([[1e30, 9.0, 7.01, 8.0, -1e30, 7.01]]), "swiglu_clamped")
    assert torch.equal(limits, beyond)
    np.testing.assert_allclose(wide(limits), 7 / (1 + np.exp(-1.702 * 7)) * np.array([[8, -6, 8]]), rtol=1e-6)
    assert library.gated_activation(torch.tensor([[-50.0, 1.0]]), "swiglu_clamped").abs() < 1e-30


@pytest.mark.usefixtures("one_thread")
def test_a_row_has_the_same_bits_in_any_batch(library: Library, dtype: torch.dtype) -> None:
    x, residual = drawn(300, 1234, dtype=dtype), drawn(300, 1234, dtype=dtype, seed=1)
    weight = drawn(1234, dtype=dtype, seed=2)
    normed = torch.cat([library.rms_norm(x[i : i + 1], weight, 1e-5, residual[i : i + 1])[0] for i in range(300)])
    activated = {kind: torch.cat([library.gated_activation(row[None], kind) for row in x]) for kind in KINDS}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(library.rms_norm(x, weight, 1e-5, residual)[0], normed)
        for kind in KINDS:
            assert torch.equal(library.gated_activation(x, kind), activated[kind])
