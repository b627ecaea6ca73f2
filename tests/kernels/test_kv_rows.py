"""The row format of quantised KV against its definition written out in NumPy: codes, scales, places, rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.kv_rows import dequantise_rows, quantise_rows

FP8 = torch.float8_e4m3fn


def fp8_values() -> np.ndarray:
    """[256] float64: what each code of E4M3 stands for, from its definition (bias 7, no infinity, one NaN a sign)."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    size = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    size[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -size, size)


def expected_codes(x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Codes as uint8, and scales, of [rows, D] float32."""
    largest = np.float32(127 if dtype == torch.int8 else 448)
    scale = np.abs(x).max(-1, keepdims=True) / largest
    quotient = x / np.where(scale > 0, scale, np.float32(1))
    if dtype == torch.int8:
        return np.clip(np.rint(quotient), -127, 127).astype(np.int8).view(np.uint8), scale
    values = fp8_values()[:127]  # not negative, rising; a tie goes to the even code
    place = np.clip(np.searchsorted(values, np.abs(quotient)), 1, 126)
    below, above = np.abs(quotient) - values[place - 1], values[place] - np.abs(quotient)
    code = np.where((below < above) | ((below == above) & (place % 2 == 1)), place - 1, place)
    return (code | np.signbit(quotient) << 7).astype(np.uint8), scale


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_and_scales(dtype: torch.dtype, source: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(40, 3, 37) * torch.logspace(-4, 3, 40)[:, None, None]).to(source)
    x[7, 1] = 0
    x[8, :, 1:] = 0
    x[9] = torch.arange(37.0) / 2  # ties
    x[10, 0] = torch.arange(37) * 1e-42 if source == torch.float32 else 0  # the scale has only a few bits, or none
    rows = quantise_rows(x, dtype)
    assert rows.dtype == dtype
    assert rows.shape == (40, 3, 41)
    flat = rows.view(torch.uint8).reshape(120, 41).numpy()
    codes, scale = expected_codes(x.float().reshape(120, 37).numpy(), dtype)
    np.testing.assert_array_equal(flat[:, 37:].copy().view(np.float32), scale)
    np.testing.assert_array_equal(flat[:, :37], codes)
    values = codes.view(np.int8).astype(np.float64) if dtype == torch.int8 else fp8_values()[codes]
    read = dequantise_rows(rows)
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.reshape(120, 37).numpy(), (values * scale).astype(np.float32))
    away = np.abs(read.numpy() - x.double().numpy())
    worst = away / np.abs(x.double().numpy()).max(-1, keepdims=True).clip(1e-300)
    assert worst[:10].max() <= (0.5 / 127 if dtype == torch.int8 else 2**-4 * 1.001)


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
def test_rows_are_read_where_nothing_is_aligned(dtype: torch.dtype) -> None:
    x = torch.randn(5, 2, 6)
    memory = torch.full((5 * 2 * 13 + 3,), 127, dtype=torch.uint8)
    strided = memory[3:].view(5, 2, 13)[..., 1:11].view(dtype)
    rows = quantise_rows(x, dtype)
    strided.copy_(rows)
    assert torch.equal(dequantise_rows(strided), dequantise_rows(rows))
    assert int((memory == 127).sum()) >= 33, "wrote beside its rows"


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=["int8", "fp8"])
@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(dtype: torch.dtype, spoiled: float) -> None:
    x = torch.ones(2, 8)
    x[1, 3] = spoiled
    read = dequantise_rows(quantise_rows(x, dtype))
    assert read[0].isfinite().all()
    assert not read[1].isfinite().any()
