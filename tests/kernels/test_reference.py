"""The references, and what the launchers compute on a CPU, against their formulas written out in NumPy float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from paged_sequences import Heads, Options, PagedSequences
from torch import Tensor

from kernels import gated_activation, linear, paged_attention, paged_attention_gpu, rms_norm

TOLERANCES = {torch.float32: (2e-6, 2e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 8e-3)}
DTYPES = list(TOLERANCES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def wide(values: Tensor) -> np.ndarray:
    return values.double().numpy()


def assert_close(actual: Tensor, expected: np.ndarray) -> None:
    rtol, atol = TOLERANCES[actual.dtype]
    np.testing.assert_allclose(wide(actual), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("run", [rms_norm.reference, rms_norm.rms_norm])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 6), (7, 123), (3, 576)])
def test_rms_norm(
    run: Callable[..., tuple[Tensor, Tensor]], num_tokens: int, hidden_size: int, offset: float, dtype: torch.dtype
) -> None:
    x, residual = torch.randn(2, num_tokens, hidden_size).to(dtype)
    weight = torch.randn(hidden_size).to(dtype)
    for other in (None, residual):
        before = x.clone()
        normed, stream = run(x, weight, 0.1, other, offset=offset)
        expected_stream = wide(x) + (0 if other is None else wide(other))
        assert_close(stream, expected_stream)
        expected = (wide(weight) + offset) * wide(stream) / np.sqrt((wide(stream) ** 2).mean(-1, keepdims=True) + 0.1)
        assert_close(normed, expected)
        assert torch.equal(x, before)


@pytest.mark.parametrize("run", [gated_activation.reference, gated_activation.gated_activation])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    gate_up = (3 * torch.randn(5, 2 * 431)).to(dtype)
    gate, up = np.split(wide(gate_up), 2, axis=-1)
    assert_close(run(gate_up, "silu"), gate / (1 + np.exp(-gate)) * up)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    assert_close(run(gate_up, "gelu_tanh"), 0.5 * gate * (1 + tanh) * up)
    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
    assert_close(run(gate_up, "swiglu_clamped"), (up + 1) * gate / (1 + np.exp(-1.702 * gate)))


ATTENTION_CASES = {  # heads, dtype of the blocks where it is not the queries', options
    "grouped": (Heads(9, 3, 64), None, Options()),
    "one KV head": (Heads(4, 1, 20), None, Options()),
    "window": (Heads(4, 2, 20), None, Options(window=9)),
    "softcap": (Heads(4, 2, 20), None, Options(softcap=2.0)),
    "sinks": (Heads(4, 2, 20), None, Options(sinks=True)),
    "narrow values": (Heads(4, 2, 24, 16), None, Options()),
    "latent": (Heads(16, 1, 36, 32, True), None, Options(window=17, softcap=2.0, sinks=True)),
    "int8": (Heads(6, 2, 24, 16), torch.int8, Options(window=17, softcap=2.0, sinks=True)),
    "int8 latent": (Heads(16, 1, 36, 32, True), torch.int8, Options()),
    "fp8": (Heads(6, 3, 20), torch.float8_e4m3fn, Options(window=1)),
    "fp8 latent": (Heads(16, 1, 36, 32, True), torch.float8_e4m3fn, Options(sinks=True)),
}


@pytest.mark.parametrize("run", [paged_attention.reference, paged_attention.paged_attention])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_tokens", [7, 16])
@pytest.mark.parametrize("case", list(ATTENTION_CASES))
def test_paged_attention(run: Callable[..., Tensor], case: str, block_tokens: int, dtype: torch.dtype) -> None:
    heads, kv_dtype, options = ATTENTION_CASES[case]
    sequences = PagedSequences(heads, [40, 6, 1, 43], dtype, kv_dtype or dtype, block_tokens)
    spans = [(0, 39, 40), (1, 0, 6), (2, 0, 1), (3, 25, 43)]
    arguments, keywords = sequences.call(spans, options)
    expected = np.concatenate([sequences.expected(span, options)[0] for span in spans])
    assert_close(run(*arguments, **keywords), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_and_embedding_share_one_weight(with_bias: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(123, 64).to(dtype)
    bias = torch.randn(123).to(dtype) if with_bias else None
    packed = linear.pack(weight.clone(), bias)
    assert (packed.n, packed.k, packed.dtype) == (123, 64, dtype)
    for num_tokens in (1, 6, 42):
        x = torch.randn(num_tokens, 64).to(dtype)
        expected = wide(x) @ wide(weight).T + (0 if bias is None else wide(bias))
        rtol = 2e-6 if dtype == torch.float32 else 8e-3
        np.testing.assert_allclose(wide(linear.linear(x, packed)), expected, rtol=rtol, atol=rtol * 8)
    token_ids = torch.tensor([122, 0, 7, 7])
    assert torch.equal(linear.embedding(token_ids, packed), weight[token_ids])


def test_the_room_imports_without_triton_and_says_so_when_it_is_needed() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernels import gated_activation, linear, paged_attention, paged_attention_gpu, rms_norm, rope_kv_write
assert gated_activation.gated_activation(torch.ones(1, 4), "silu").shape == (1, 2)
try:
    gated_activation.launch(torch.ones(1, 4), "silu")
except ImportError as error:
    assert "legato[gpu]" in str(error)
else:
    raise SystemExit("launched without Triton")
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("num_programs", "most_kv_tokens", "expected"),
    [(1, 200, 1), (1, 8192, 32), (1, 10**6, 64), (24, 8192, 8), (132, 8192, 2), (200, 8192, 1), (1000, 8192, 1)],
)
def test_kv_is_split_while_multiprocessors_are_idle(num_programs: int, most_kv_tokens: int, expected: int) -> None:
    assert paged_attention_gpu.choose_splits(num_programs, most_kv_tokens, num_multiprocessors=132) == expected


def test_wide_results_are_not_rounded_in_between() -> None:
    """Where torch serves, logits of bfloat16 must not tie by their rounding."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 96).bfloat16(), torch.randn(9000, 96).bfloat16(), torch.randn(9000).bfloat16()
    packed = linear.PackedLinear(weight, bias, 9000, 96, torch.bfloat16)
    found = linear.linear(x, packed, wide=True)
    expected = wide(x) @ wide(weight).T + wide(bias)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(wide(found), expected, rtol=1e-5, atol=1e-4)
