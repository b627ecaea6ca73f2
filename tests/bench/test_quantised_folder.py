"""What is written is bit for bit what the packages of each format write, which no test can install: their bytes are
here as digests, made once of the same weights by AutoGPTQ 0.7.1, AutoAWQ 0.2.9, compressed-tensors 0.14.0 and ModelOpt
0.47.0.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from bench.float_checkpoints import compressed_mxfp4, compressed_nvfp4, modelopt_nvfp4, stacked_mxfp4
from bench.integer_checkpoints import awq, gptq


def weight_of(outputs: int, inputs: int) -> Tensor:
    return (torch.arange(outputs * inputs).view(outputs, inputs) * 37 % 101 - 50).float() / 32


def digest_of(*tensors: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"group": 8, "symmetric": False}, "458f0c5c096bfa49"),
        ({"group": 12}, "ffcbde41462b17f5"),
        ({"group": 8, "symmetric": False, "bits": 8}, "0ddeb7eeca28a9ea"),
        ({"group": 8, "in_order": False}, "eba289ebd8218d08"),
    ],
    ids=str,
)
def test_gptq_is_what_auto_gptq_packs(options: dict[str, int], expected: str) -> None:
    stored, _ = gptq(weight_of(32, 32), **options)
    assert digest_of(stored["qweight"], stored["qzeros"]) == expected
    if "in_order" in options:
        assert stored["g_idx"][:8].tolist() == [0, 3, 2, 2, 0, 0, 3, 3]


def test_awq_is_what_auto_awq_packs() -> None:
    stored, _ = awq(weight_of(32, 32), group=8)
    assert digest_of(stored["qweight"], stored["qzeros"]) == "0ff0ce317f8e5092"


def test_nvfp4_is_what_compressed_tensors_and_modelopt_pack() -> None:
    stored, values = compressed_nvfp4(weight_of(6, 64))
    assert digest_of(stored["weight_packed"], stored["weight_scale"]) == "be04c557f15e04de"
    torch.testing.assert_close(stored["weight_global_scale"], torch.tensor([1720.32]))
    other, same = modelopt_nvfp4(weight_of(6, 64))
    assert digest_of(other["weight"], other["weight_scale"]) == "be04c557f15e04de"
    torch.testing.assert_close(other["weight_scale_2"], torch.tensor(1 / 1720.32))
    assert torch.equal(values, same)


def test_mxfp4_is_what_transformers_expands() -> None:
    stacked = weight_of(64, 30).view(1, 64, 30)
    stored, values = stacked_mxfp4(stacked)
    assert torch.equal(convert_moe_packed_tensors(stored["_blocks"], stored["_scales"], dtype=torch.float32), values)
    matrix, _ = compressed_mxfp4(stacked[0].T)
    assert torch.equal(matrix["weight_packed"], stored["_blocks"][0].flatten(1))
    assert torch.equal(matrix["weight_scale"], stored["_scales"][0])
