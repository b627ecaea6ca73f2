"""The formats: what their codes mean, by their definitions and by the packages that write such files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from quantised_weights import FORMS, drawn_weight, numbers_by_definition
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kernels.quantised import KINDS, Kind, QuantisedWeight, concatenate, dequantise, quantise

N, K = 7, 192  # of six blocks of 32


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def in_pairs(codes: Tensor) -> Tensor:
    """[N, K] codes of four bits -> as QuantisedWeight holds them."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()


def gguf_blocks(kind: GGMLQuantizationType, header_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """What gguf makes of the same random weight: its values, and of each block of 32 the header and the codes."""
    packed = quants.quantize(drawn(N, K).numpy(), kind)
    blocks = torch.from_numpy(packed).view(N, K // 32, -1)
    values = torch.from_numpy(quants.dequantize(packed, kind))
    return values, blocks[..., :header_bytes].contiguous(), blocks[..., header_bytes:]


def halves_apart(codes: Tensor) -> Tensor:
    """gguf's sixteen bytes of 32 codes: the first sixteen in the low halves, then those in the high ones."""
    return in_pairs(torch.cat([codes & 15, codes >> 4], dim=-1).view(N, K))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_mean_what_their_format_defines(kind: Kind) -> None:
    expected = numbers_by_definition(kind)
    codes = torch.arange(len(expected), dtype=torch.uint8)[None]
    codes = in_pairs(codes) if len(expected) == 16 else codes
    codes = codes.view({"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(kind, torch.uint8))
    scale, k = torch.ones(1, 1), len(expected)
    weight = QuantisedWeight(kind, codes, scale, k, k)
    torch.testing.assert_close(dequantise(weight)[0].double(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 7, 123, 300])
def test_a_value_is_scale_times_number_plus_offset(form: str, k: int) -> None:
    weight = drawn_weight(FORMS[form], N, k)
    numbers = numbers_by_definition(weight.kind)
    for n, i in [(0, 0), (N - 1, k - 1), (3, k // 2), (N - 2, k // 3)]:
        code = weight.codes.view(torch.uint8)[n, i // 2 if len(numbers) == 16 else i].item()
        code = code >> 4 * (i % 2) & 15 if len(numbers) == 16 else code
        group = i // weight.group
        expected = weight.scales[n, group].double() * numbers[code]
        if weight.offsets is not None:
            expected = expected + weight.offsets[n, group].double()
        if weight.output_scales is not None:
            expected = expected * weight.output_scales[n].double()
        torch.testing.assert_close(dequantise(weight)[n, i].double(), expected, rtol=2**-22, atol=1e-6)


def test_int8_blocks_of_gguf() -> None:
    values, header, codes = gguf_blocks(GGMLQuantizationType.Q8_0, 2)
    weight = QuantisedWeight("int8", codes.reshape(N, K).view(torch.int8), header.view(torch.float16)[..., 0], K, 32)
    assert torch.equal(dequantise(weight), values)


def test_int4_blocks_of_gguf() -> None:
    values, header, codes = gguf_blocks(GGMLQuantizationType.Q4_0, 2)
    weight = QuantisedWeight("int4", halves_apart(codes), header.view(torch.float16)[..., 0], K, 32)
    assert torch.equal(dequantise(weight), values)
    values, header, codes = gguf_blocks(GGMLQuantizationType.Q4_1, 4)
    scales, least = header.view(torch.float16).unbind(-1)
    weight = QuantisedWeight("int4", halves_apart(codes), scales, K, 32, least.float() + 8 * scales.float())
    torch.testing.assert_close(dequantise(weight), values, rtol=2**-22, atol=2**-21)


def test_mxfp4_of_gguf_and_of_transformers() -> None:
    values, header, codes = gguf_blocks(GGMLQuantizationType.MXFP4, 1)
    weight = QuantisedWeight("fp4", halves_apart(codes), header[..., 0].view(torch.float8_e8m0fnu), K, 32)
    assert torch.equal(dequantise(weight), values)
    random = torch.Generator().manual_seed(1)
    blocks = torch.randint(256, (1, N, K // 32, 16), generator=random, dtype=torch.uint8)
    scales = torch.randint(100, 150, (1, N, K // 32), generator=random, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].T
    weight = QuantisedWeight("fp4", blocks.view(N, -1), scales[0].view(torch.float8_e8m0fnu), K, 32)
    assert torch.equal(dequantise(weight), expected)


def test_zero_points_of_gptq_and_awq() -> None:
    random = torch.Generator().manual_seed(2)
    codes = torch.randint(16, (N, K), generator=random, dtype=torch.uint8)
    zeros = torch.randint(17, (N, K // 64), generator=random)
    scales = (0.01 * drawn(N, K // 64)).half()
    expected = scales.double().repeat_interleave(64, 1) * (codes.double() - zeros.repeat_interleave(64, 1))
    weight = QuantisedWeight("int4", in_pairs(codes), scales, K, 64, scales.float() * (8 - zeros))
    torch.testing.assert_close(dequantise(weight).double(), expected, rtol=0, atol=1e-8)


def test_blocks_of_128_by_128() -> None:
    """DeepSeek's: a scale is repeated for the outputs that share it."""
    weight, scales = drawn(300, 260).to(torch.float8_e4m3fn), drawn(3, 3)
    expected = weight.double() * scales.double().repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :260]
    held = QuantisedWeight("fp8", weight, scales.repeat_interleave(128, 0)[:300], 260, 128)
    torch.testing.assert_close(dequantise(held).double(), expected, rtol=2**-23, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_taken_and_joined(form: str) -> None:
    weight = drawn_weight(FORMS[form], 12, 123)
    values = dequantise(weight)
    picked = torch.tensor([11, 0, 5, 5])
    assert torch.equal(dequantise(weight[picked]), values[picked])
    assert torch.equal(dequantise(weight[3:10]), values[3:10])
    assert torch.equal(dequantise(concatenate([weight[:5], weight[5:6], weight[6:]])), values)


def test_parts_that_differ_are_not_joined() -> None:
    one = drawn_weight(FORMS["int4 per 32"], 12, 128)
    for other in ("int4 per 128, zero points", "int8 per 32", "mxfp4"):
        with pytest.raises(AssertionError):
            concatenate([one, drawn_weight(FORMS[other], 12, 128)])


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("k", [1, 33, 300])
def test_quantising_rounds_to_the_nearest_number(kind: Kind, group: int | None, k: int) -> None:
    weight = drawn(9, k)
    weight[4] = 0
    held = quantise(weight, kind, group)
    spread = held.scales.double().repeat_interleave(held.group, 1)[:, :k].numpy()
    numbers = numbers_by_definition(kind).numpy()
    numbers = np.unique(numbers[np.abs(numbers) <= {"int8": 127, "int4": 8, "fp8": 448}[kind]])
    nearest = np.abs(numbers * spread[..., None] - weight.double().numpy()[..., None]).min(-1)
    error = np.abs(dequantise(held).double().numpy() - weight.double().numpy())
    assert (error <= nearest + np.abs(weight.double().numpy()) * 2**-22).all()
    assert (dequantise(held)[4] == 0).all()
    # Of the greatest of a group, little is lost: the number that it takes is chosen by the scale.
    assert (
        np.abs(spread).max()
        <= 1.001 * np.abs(weight.double().numpy()).max() / {"int8": 127, "int4": 8, "fp8": 448}[kind]
    )


def test_quantising_to_int4_is_as_good_as_gguf() -> None:
    weight = drawn(64, K)
    theirs = torch.from_numpy(
        quants.dequantize(quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0)
    )
    ours = dequantise(quantise(weight, "int4", 32))
    assert (ours - weight).square().sum() <= 1.001 * (theirs - weight).square().sum()
    assert (ours == theirs).float().mean() > 0.99
