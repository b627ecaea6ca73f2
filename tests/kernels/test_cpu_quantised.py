"""Products with quantised weights against NumPy in float64, and a row's bits whatever is computed beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantised_weights import FORMS, drawn_weight, magnitudes, numbers_by_definition
from torch import Tensor

from kernels.cpu import library as library_module
from kernels.cpu.library import Library
from kernels.linear import embedding, linear, pack_quantised, reference, unpack
from kernels.quantised import KINDS, Kind, QuantisedWeight, dequantise

SHAPES = [(1, 1), (33, 7), (31, 64), (96, 123), (130, 577), (64, 2)]
ROWS = [1, 2, 3, 7, 16, 123]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_poison(values: Tensor) -> Tensor:
    """The same values between NaNs, so that a read beside them shows."""
    buffer = torch.full((values.numel() + 128,), float("nan"), dtype=values.dtype)
    buffer[64:-64] = values.flatten()
    return buffer[64:-64].view(values.shape)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("guarded", "one_thread")
def test_a_product_agrees_with_float64(library: Library, dtype: torch.dtype, form: str, shape: tuple[int, int]) -> None:
    n, k = shape
    weight, bias = drawn_weight(FORMS[form], n, k), drawn(n, dtype=dtype, seed=1)
    panels, values = library.pack_quantised(weight), dequantise(weight).double().numpy()
    for rows in ROWS:
        x = in_poison(drawn(rows, k, dtype=dtype, seed=rows))
        plain, sizes = x.double().numpy() @ values.T, magnitudes(x, weight).numpy()
        for added in (None, bias):
            expected = plain if added is None else plain + added.double().numpy()
            # Of fp32, the rounding of each term's addition; of the result, half a unit in its last place.
            sums = (sizes + 4) * (k + 4) * 2**-24
            rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
            found = library.linear(x, panels, added, n)
            assert found.dtype == dtype
            assert (np.abs(found.double().numpy() - expected) <= np.abs(expected) * rounding * 1.01 + sums).all()
            unrounded = library.linear(x, panels, added, n, wide=True)
            assert unrounded.dtype == torch.float32
            assert (np.abs(unrounded.double().numpy() - expected) <= np.abs(expected) * 2**-23 + sums).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(130, 577), (33, 7)])
@pytest.mark.usefixtures("one_thread")
def test_a_row_has_the_same_bits_in_any_batch(
    library: Library, dtype: torch.dtype, form: str, shape: tuple[int, int]
) -> None:
    n, k = shape
    panels, x = library.pack_quantised(drawn_weight(FORMS[form], n, k)), drawn(60, k, dtype=dtype, seed=1)
    alone = torch.cat([library.linear(x[row : row + 1], panels, None, n) for row in range(len(x))])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for chunk in (2, 4, 7, 12, 13, 60):
            pieces = [library.linear(piece, panels, None, n) for piece in x.split(chunk)]
            assert torch.equal(torch.cat(pieces), alone)


@pytest.mark.parametrize("form", ["int4 per 128, zero points", "mxfp4", "int8 per output"])
def test_a_row_of_nans_stays_in_its_row(library: Library, dtype: torch.dtype, form: str) -> None:
    panels, x = library.pack_quantised(drawn_weight(FORMS[form], 40, 31)), drawn(5, 31, dtype=dtype)
    clean = library.linear(x, panels, None, 40)
    x[2] = float("nan")
    out = library.linear(x, panels, None, 40)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_expanded_to_its_number(library: Library, dtype: torch.dtype, kind: Kind) -> None:
    """In every place of a unit, and of a panel of columns."""
    numbers = numbers_by_definition(kind)
    codes = torch.arange(256, dtype=torch.uint8).repeat(40, 1) + torch.arange(40, dtype=torch.uint8)[:, None]
    codes = codes.view({"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kind, torch.uint8))
    k = 512 if len(numbers) == 16 else 256
    weight = QuantisedWeight(kind, codes, torch.ones(40, 1), k, k)
    panels = library.pack_quantised(weight)
    halves = torch.stack([codes.view(torch.uint8) & 15, codes.view(torch.uint8) >> 4], -1).flatten(1)
    expected = numbers[(halves if k == 512 else codes.view(torch.uint8)).long()]
    torch.testing.assert_close(library.unpack(panels, 40, k).double(), expected, rtol=0, atol=0, equal_nan=True)
    if kind == "fp8":
        weight.codes.view(torch.uint8)[weight.codes.isnan()] = 0
        expected, panels = expected.nan_to_num(), library.pack_quantised(weight)
    product = library.linear(torch.eye(k, dtype=dtype), panels, None, 40, wide=True)
    assert torch.equal(product.T.double(), expected)


@pytest.mark.parametrize("dtype_of_scales", [torch.float16, torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn])
def test_every_scale_is_read_as_torch_reads_it(library: Library, dtype_of_scales: torch.dtype) -> None:
    itemsize = torch.tensor([], dtype=dtype_of_scales).element_size()
    bits = torch.arange(256, dtype=torch.uint8) if itemsize == 1 else torch.arange(-(2**15), 2**15, dtype=torch.int16)
    scales = bits.view(dtype_of_scales).view(-1, 8)
    weight = QuantisedWeight("int8", torch.ones(len(scales), 64, dtype=torch.int8), scales, 64, 8)
    found = library.unpack(library.pack_quantised(weight), weight.n, 64)
    torch.testing.assert_close(found[:, ::8], scales.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("guarded")
def test_an_embedding_is_a_row_of_the_weight(
    library: Library, dtype: torch.dtype, form: str, shape: tuple[int, int]
) -> None:
    weight = drawn_weight(FORMS[form], *shape)
    panels, values = library.pack_quantised(weight), dequantise(weight)
    token_ids = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    assert torch.equal(library.embedding(token_ids, panels, *shape, dtype), values[token_ids].to(dtype))
    assert torch.equal(library.unpack(panels, *shape), values)


def test_a_token_id_out_of_range_reads_nothing(library: Library, dtype: torch.dtype) -> None:
    panels = library.pack_quantised(drawn_weight(FORMS["int4 per 32"], 40, 8))
    for outside in (40, -1):
        with pytest.raises(AssertionError, match="token ids"):
            library.embedding(torch.tensor([0, outside]), panels, 40, 8, dtype)


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_launchers_serve_with_and_without_the_library(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: str, served: bool
) -> None:
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)
    weight = drawn_weight(FORMS[form], 70, 100)
    bias, x = drawn(70, dtype=dtype), drawn(5, 100, dtype=dtype)
    packed, values = pack_quantised(weight, dtype, bias), dequantise(weight)
    assert served or packed.library is None
    assert torch.equal(unpack(packed), values)
    for wide in (False, True):
        expected = torch.nn.functional.linear(x.double(), values.double(), bias.double())
        expected = expected.to(torch.float32 if wide else dtype)
        torch.testing.assert_close(linear(x, packed, wide=wide), expected, atol=2e-2, rtol=2**-7)
        torch.testing.assert_close(linear(x, packed, wide=wide), reference(x, packed, wide=wide), atol=2e-2, rtol=2**-7)
    assert torch.equal(embedding(torch.tensor([3, 69]), packed), values[[3, 69]].to(dtype))
