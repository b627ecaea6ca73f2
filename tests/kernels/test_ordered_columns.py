"""Weights of which any inputs share a scale, against NumPy in float64 by the group of each input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from quantised_weights import numbers_by_definition
from torch import Tensor

from kernels.cpu import library as library_module
from kernels.cpu.library import Library
from kernels.linear import embedding, linear, pack_quantised, reference, unpack
from kernels.ordered_columns import ordered_columns
from kernels.quantised import Kind, QuantisedWeight, alike, concatenate, dequantise, ordered

SIZES = {  # of the groups
    "equal": [32, 32, 32],
    "the last is short": [24, 24, 24, 7],
    "odd": [1, 42, 0, 123, 6],
    "one": [51],
    "a column each": [1] * 9,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shuffled(kind: Kind, sizes: list[int], n: int = 21, seed: int = 0) -> tuple[QuantisedWeight, np.ndarray]:
    """A weight whose inputs are of groups in no order, and its values [n, K] in float64."""
    random = torch.Generator().manual_seed(seed)
    group_of = torch.repeat_interleave(torch.tensor(sizes))
    group_of = group_of[torch.randperm(len(group_of), generator=random)]
    codes = torch.randint(16 if kind == "int4" else 120, (n, len(group_of)), generator=random, dtype=torch.uint8)
    scales, offsets = drawn(n, len(sizes), seed=seed).half(), drawn(n, len(sizes), seed=seed + 1)
    values = numbers_by_definition(kind)[codes.long()] * scales.double()[:, group_of] + offsets.double()[:, group_of]
    return ordered(kind, codes, group_of, torch.arange(len(group_of)), scales, offsets), values.numpy()


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_are_those_of_each_inputs_group(kind: Kind, sizes: list[int]) -> None:
    weight, values = shuffled(kind, sizes)
    assert weight.inputs == sum(sizes)
    np.testing.assert_allclose(dequantise(weight).double().numpy(), values, rtol=2**-21, atol=1e-6)
    for start, stop in [(0, sum(sizes)), (0, 1), (3, 8), (sum(sizes) // 2, sum(sizes))]:
        part = weight.columns(start, stop)
        assert part.inputs == stop - start
        assert torch.equal(dequantise(part), dequantise(weight)[:, start:stop])
        assert torch.equal(dequantise(part[2:9]), dequantise(weight)[2:9, start:stop])


def test_equal_groups_take_no_more_than_in_order() -> None:
    weight, _ = shuffled("int4", [128] * 4 + [64])
    assert (weight.k, weight.group, weight.scales.shape) == (576, 128, (21, 5))
    half = weight.columns(0, 288)
    assert half.codes.nbytes + half.scales.nbytes + half.offsets.nbytes < 1.6 * 21 * 288 / 2


def test_only_those_of_one_order_are_joined() -> None:
    (one, _), (other, _) = shuffled("int4", [16, 16]), shuffled("int4", [16, 16], seed=5)
    assert torch.equal(dequantise(concatenate([one[:3], one[3:]])), dequantise(one))
    assert not alike([one, other])
    with pytest.raises(AssertionError):
        concatenate([one, other])
    assert not alike([one, QuantisedWeight("int4", one.codes, one.scales, one.k, one.group, one.offsets)])


@pytest.mark.parametrize("served", [True, False])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_product_reads_its_rows_in_that_order(
    monkeypatch: pytest.MonkeyPatch, library: Library, dtype: torch.dtype, sizes: list[int], served: bool
) -> None:
    monkeypatch.setattr(library_module, "shared_library", lambda: library if served else None)
    weight, values = shuffled("int4", sizes)
    bias = drawn(21, seed=3).to(dtype)
    packed = pack_quantised(weight, dtype, bias)
    assert (packed.k, packed.library is library) == (sum(sizes), served)
    np.testing.assert_allclose(unpack(packed).double().numpy(), values, rtol=2**-21, atol=1e-6)
    for rows in (1, 3, 17):
        x = drawn(rows, sum(sizes), seed=rows).to(dtype)
        expected = x.double().numpy() @ values.T + bias.double().numpy()
        for run in (linear, reference):
            for wide in (False, True):
                found = run(x, packed, wide=wide).double().numpy()
                np.testing.assert_allclose(found, expected, rtol=1e-5 if dtype == torch.float32 else 0.01, atol=0.05)
    token_ids = torch.tensor([20, 0, 3])
    assert torch.equal(embedding(token_ids, packed), unpack(packed)[token_ids].to(dtype))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.usefixtures("guarded", "one_thread")
def test_columns_are_taken_in_an_order(library: Library, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    for rows, size, columns in [(1, 1, 3), (5, 123, 130), (42, 577, 600), (0, 7, 8)]:
        x, order = drawn(rows, size).to(dtype), torch.from_numpy(random.integers(-1, size, columns))
        expected = np.where(order.numpy() < 0, 0, x.double().numpy()[:, order.numpy().clip(0)])
        assert (library.ordered_columns(x, order).double().numpy() == expected).all()
        assert (ordered_columns(x.double(), order).numpy() == expected).all()
