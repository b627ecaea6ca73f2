"""Each head's own product against NumPy in float64, and a row's bits whatever is computed beside it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu import library as library_module
from kernels.head_linear import head_linear, pack_heads

SHAPES = [(1, 1, 1), (3, 33, 7), (5, 64, 129), (2, 130, 512)]  # heads, outputs, inputs


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("one_thread")
def test_a_product_agrees_with_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int, int], served: bool
) -> None:
    """Of columns between others, into columns between others, which stay as they are."""
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)
    heads, n, k = shape
    weight = drawn(heads, n, k, dtype=dtype)
    packed = pack_heads(weight)
    assert served or packed.library is None
    for rows in (0, 1, 6, 123):
        x = drawn(rows, heads + 1, k + 5, dtype=dtype, seed=1)[:, 1:, 2 : 2 + k]
        room = torch.full((rows, heads + 1, n + 3), 7.0, dtype=dtype)
        out = head_linear(x, packed, room[:, :heads, 1 : 1 + n])
        assert not served or torch.equal(head_linear(x.contiguous(), packed), out)
        expected = np.einsum("thk,hnk->thn", x.double().numpy(), weight.double().numpy())
        terms = np.einsum("thk,hnk->thn", x.double().abs().numpy(), weight.double().abs().numpy())
        rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
        bound = np.abs(expected) * rounding * 1.01 + (terms + 4) * (k + 1) * 2**-24
        assert (np.abs(out.double().numpy() - expected) <= bound).all()
        assert (room[:, heads] == 7).all() and (room[:, :, [0, n + 1, n + 2]] == 7).all()


@pytest.mark.skipif(library_module.shared_library() is None, reason="no C++ compiler: it is the product of torch")
@pytest.mark.parametrize("k", [129, 1024])  # rows of the latter fall into few sets of the cache, and are spread
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, k: int) -> None:
    packed, x = pack_heads(drawn(3, 40, k, dtype=dtype)), drawn(30, 3, k, dtype=dtype, seed=1)
    alone = torch.cat([head_linear(row, packed) for row in x.split(1)])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for chunk in (4, 13, 30):
            assert torch.equal(torch.cat([head_linear(piece, packed) for piece in x.split(chunk)]), alone)
