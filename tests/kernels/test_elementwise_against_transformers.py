"""Norms, activations and rotations against the modules of the families that brought them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.phi3 import modeling_phi3
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from kernels.gated_activation import gated_activation
from kernels.rms_norm import rms_norm
from kernels.rope_kv_write import rope_kv_write

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


def queries_and_keys(
    heads: tuple[int, int], head_dim: int, rotary: nn.Module, dtype: torch.dtype, **options: object
) -> tuple[Tensor, ...]:
    """Random queries and keys of 29 tokens, [1, H, 29, D]; the module's cos and sin; what we make of them all."""
    num_heads, num_kv_heads = heads
    q, k, v = ((3 * torch.randn(29, count, head_dim)).to(dtype) for count in (num_heads, num_kv_heads, num_kv_heads))
    cos, sin = rotary(q.float(), torch.arange(29)[None])
    half = cos.shape[-1] // 2
    keys, values = torch.zeros(2, 4, num_kv_heads, 8, head_dim, dtype=dtype)
    qkv, index = torch.cat((q, k, v), dim=1).flatten(1), torch.arange(29)
    tables = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    queries = rope_kv_write(qkv, *tables, index, index, keys, values, num_heads, **options)
    written = keys.transpose(1, 2).flatten(0, 1)[:29]
    return q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin, queries, written


def assert_turned(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Theirs rounds after every operation in bfloat16: what is compared there is their float32."""
    for ours, theirs in zip(found, expected, strict=True):
        # One rounding of the normed head, and one at the end, of elements up to about 10.
        absolute = 1e-5 if ours.dtype == torch.float32 else 10 * 2**-7
        torch.testing.assert_close(ours.float(), theirs[0].transpose(0, 1).float(), rtol=0, atol=absolute)


@torch.no_grad()
def test_qwen3_query_and_key_norms(dtype: torch.dtype) -> None:
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=0.1)
    attention, rotary = modeling_qwen3.Qwen3Attention(config, 0), modeling_qwen3.Qwen3RotaryEmbedding(config)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.copy_(torch.randn(32).to(dtype))
    norms = {"query_norm": attention.q_norm.weight.to(dtype), "key_norm": attention.k_norm.weight.to(dtype)}
    q, k, cos, sin, *found = queries_and_keys((4, 2), 32, rotary, dtype, **norms, norm_eps=0.1)
    normed = attention.q_norm(q.float()), attention.k_norm(k.float())
    assert_turned(tuple(found), modeling_qwen3.apply_rotary_pos_emb(*normed, cos, sin))


@torch.no_grad()
def test_gemma3_query_and_key_norms(dtype: torch.dtype) -> None:
    rotary = modeling_qwen3.Qwen3RotaryEmbedding(Qwen3Config(head_dim=48))
    q_norm, k_norm = Gemma3RMSNorm(48, eps=0.1), Gemma3RMSNorm(48, eps=0.1)
    for norm in (q_norm, k_norm):
        norm.weight.copy_(torch.randn(48).to(dtype))
    norms = {"query_norm": q_norm.weight.to(dtype), "key_norm": k_norm.weight.to(dtype)}
    q, k, cos, sin, *found = queries_and_keys((3, 1), 48, rotary, dtype, **norms, norm_eps=0.1, norm_offset=1.0)
    assert_turned(tuple(found), modeling_gemma3.apply_rotary_pos_emb(q_norm(q.float()), k_norm(k.float()), cos, sin))


@torch.no_grad()
def test_phi3_turns_a_part_of_a_head(dtype: torch.dtype) -> None:
    config = Phi3Config(hidden_size=3 * 40, num_attention_heads=3, num_key_value_heads=1, pad_token_id=0)
    config.rope_parameters["partial_rotary_factor"] = 0.75
    rotary = modeling_phi3.Phi3RotaryEmbedding(config)
    q, k, cos, sin, *found = queries_and_keys((3, 1), 40, rotary, dtype)
    assert cos.shape[-1] == 30
    assert_turned(tuple(found), modeling_phi3.apply_rotary_pos_emb(q.float(), k.float(), cos, sin))
