"""Norms and activations against the modules of the families that brought them."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from kernels.gated_activation import gated_activation
from kernels.rms_norm import rms_norm

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-7}  # what one rounding apart can be


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 123, 2304])
def test_gemma_norm(dtype: torch.dtype, size: int) -> None:
    norm = Gemma3RMSNorm(size, eps=1e-6).to(dtype)
    norm.weight.copy_(torch.randn(size) / 4)
    x = torch.randn(17, size).to(dtype)
    normed, _ = rms_norm(x, norm.weight, 1e-6, offset=1.0)
    torch.testing.assert_close(normed, norm(x), rtol=TOLERANCES[dtype], atol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [6, 431])
def test_gpt_oss_activation(dtype: torch.dtype, size: int) -> None:
    config = GptOssConfig(hidden_size=8, intermediate_size=size, num_local_experts=1)
    gate, up = (5 * torch.randn(2, 7, size)).to(dtype)
    interleaved = torch.stack((gate, up), dim=-1).flatten(1).float()
    expected = GptOssExperts(config)._apply_gate(interleaved).to(dtype)
    found = gated_activation(torch.cat((gate, up), dim=-1), "swiglu_clamped")
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_activations_by_their_names_in_a_configuration(dtype: torch.dtype, kind: str, name: str) -> None:
    gate, up = (3 * torch.randn(2, 7, 431)).to(dtype)
    expected = (ACT2FN[name](gate.float()) * up.float()).to(dtype)
    found = gated_activation(torch.cat((gate, up), dim=-1), kind)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=5e-6)
