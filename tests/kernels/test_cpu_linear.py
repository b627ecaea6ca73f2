"""Packed products against NumPy in float64, and a row's bits whatever is computed beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu import library as library_module
from kernels.cpu.library import Library
from kernels.linear import embedding, linear, pack, reference, unpack

SHAPES = [(1, 1), (33, 7), (31, 64), (96, 123), (130, 577), (64, 2)]
ROWS = [1, 2, 3, 7, 16, 123]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("guarded", "one_thread")
def test_a_product_agrees_with_float64(library: Library, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    n, k = shape
    weight, bias = drawn(n, k, dtype=dtype), drawn(n, dtype=dtype, seed=1)
    panels = library.pack(weight)
    assert torch.equal(library.unpack(panels, n, k), weight)
    for rows in ROWS:
        x = drawn(rows, k, dtype=dtype, seed=rows)
        plain = wide(x) @ wide(weight).T
        terms = np.abs(wide(x)) @ np.abs(wide(weight)).T
        for added in (None, bias):
            expected = plain if added is None else plain + wide(added)
            # Half a unit in the last place of the result, and the fp32 rounding of each term's addition.
            # A wide result has only the second.
            sums = (terms + 4) * (k + 1) * 2**-24
            rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
            bound = np.abs(expected) * rounding * 1.01 + sums
            assert (np.abs(wide(library.linear(x, panels, added, n)) - expected) <= bound).all()
            unrounded = library.linear(x, panels, added, n, wide=True)
            assert unrounded.dtype == torch.float32
            assert (np.abs(wide(unrounded) - expected) <= np.abs(expected) * 2**-23 + sums).all()


@pytest.mark.parametrize("shape", [(130, 577), (33, 7), (1056, 96)])
@pytest.mark.usefixtures("one_thread")
def test_a_row_has_the_same_bits_in_any_batch(library: Library, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    n, k = shape
    panels, x = library.pack(drawn(n, k, dtype=dtype)), drawn(150, k, dtype=dtype, seed=1)
    alone = torch.cat([library.linear(x[row : row + 1], panels, None, n) for row in range(len(x))])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for chunk in (2, 7, 12, 13, 64, 150):
            pieces = [library.linear(piece, panels, None, n) for piece in x.split(chunk)]
            assert torch.equal(torch.cat(pieces), alone)


def test_a_row_of_nans_stays_in_its_row(library: Library, dtype: torch.dtype) -> None:
    panels, x = library.pack(drawn(40, 31, dtype=dtype)), drawn(5, 31, dtype=dtype)
    clean = library.linear(x, panels, None, 40)
    x[2] = float("nan")
    out = library.linear(x, panels, None, 40)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("shape", SHAPES)
def test_an_embedding_is_a_row_of_the_weight(library: Library, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = drawn(*shape, dtype=dtype)
    token_ids = torch.tensor([shape[0] - 1, 0, shape[0] // 2, 0])
    assert torch.equal(library.embedding(token_ids, library.pack(weight), *shape, dtype), weight[token_ids])


def test_a_token_id_out_of_range_reads_nothing(library: Library, dtype: torch.dtype) -> None:
    panels = library.pack(drawn(40, 8, dtype=dtype))
    for outside in (40, -1):
        with pytest.raises(AssertionError, match="token ids"):
            library.embedding(torch.tensor([0, outside]), panels, 40, 8, dtype)


@pytest.mark.parametrize("served", [True, False])
def test_launchers_serve_with_and_without_the_library(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, served: bool
) -> None:
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)
    weight, bias, x = drawn(70, 33, dtype=dtype), drawn(70, dtype=dtype), drawn(5, 33, dtype=dtype)
    packed = pack(weight, bias)
    assert served or packed.library is None
    assert torch.equal(unpack(packed), weight)
    torch.testing.assert_close(linear(x, packed), torch.nn.functional.linear(x, weight, bias), atol=1e-4, rtol=2**-7)
    torch.testing.assert_close(linear(x, packed), reference(x, packed), atol=1e-4, rtol=2**-7)
    assert torch.equal(embedding(torch.tensor([3, 69]), packed), weight[[3, 69]])
