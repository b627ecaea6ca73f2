"""The references, and what the launchers compute on a CPU, against their formulas written out in NumPy float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import gated_activation, linear, paged_attention, rms_norm, rope_kv_write

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


@pytest.mark.parametrize("run", [rope_kv_write.reference, rope_kv_write.rope_kv_write])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_kv_write(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    num_tokens, num_heads, num_kv_heads, head_dim, block_tokens, num_blocks = 11, 6, 2, 20, 7, 3
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(dtype)
    angles = torch.outer(torch.arange(40).float(), torch.rand(head_dim // 2))
    positions = torch.randint(40, (num_tokens,))
    slots = torch.randperm(num_blocks * block_tokens)[:num_tokens]
    memory = torch.full((num_blocks, 2, 2, num_kv_heads, block_tokens, head_dim), float("nan"), dtype=dtype)
    queries = run(
        qkv.flatten(1), angles.cos(), angles.sin(), positions, slots, memory[:, 1, 0], memory[:, 1, 1], num_heads
    )

    # As a complex number of angle α turns (x[i], x[i + D / 2]).
    pairs = wide(qkv[..., : head_dim // 2]) + 1j * wide(qkv[..., head_dim // 2 :])
    turned = pairs * np.exp(1j * wide(angles)[positions])[:, None]
    rotated = np.concatenate([turned.real, turned.imag], axis=-1)
    assert_close(queries, rotated[:, :num_heads])
    for token, slot in enumerate(slots.tolist()):
        key, value = memory[slot // block_tokens, 1, :, :, slot % block_tokens]
        assert_close(key, rotated[token, num_heads : num_heads + num_kv_heads])
        assert torch.equal(value, qkv[token, num_heads + num_kv_heads :])
    assert int(memory.isfinite().sum()) == 2 * num_tokens * num_kv_heads * head_dim, "wrote beside its slots"


@pytest.mark.parametrize("run", [paged_attention.reference, paged_attention.paged_attention])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim", "block_tokens"), [(9, 3, 64, 16), (4, 1, 20, 7)])
def test_paged_attention(
    run: Callable[..., Tensor], num_heads: int, num_kv_heads: int, head_dim: int, block_tokens: int, dtype: torch.dtype
) -> None:
    lengths = [(1, 40), (6, 6), (1, 1), (18, 43)]  # queries, context
    spare = torch.randperm(64).tolist()
    tables = torch.full((len(lengths), 64), 2**30, dtype=torch.int32)
    memory = torch.full((64, 2, 2, num_kv_heads, block_tokens, head_dim), float("nan"), dtype=dtype)
    q = torch.randn(sum(queries for queries, _ in lengths), num_heads, head_dim).to(dtype)
    starts = np.cumsum([0, *(queries for queries, _ in lengths)])
    expected = np.empty((len(q), num_heads, head_dim))
    for row, (num_queries, context) in enumerate(lengths):
        keys, values = torch.randn(2, context, num_kv_heads, head_dim).to(dtype)
        for n in range(context):
            if n % block_tokens == 0:
                tables[row, n // block_tokens] = spare.pop()
            memory[tables[row, n // block_tokens], 1, :, :, n % block_tokens] = torch.stack([keys[n], values[n]])
        for j in range(num_queries):
            seen = context - num_queries + j + 1
            for head in range(num_heads):
                kv_head = head // (num_heads // num_kv_heads)
                weights = np.exp(wide(keys[:seen, kv_head]) @ wide(q[starts[row] + j, head]) * 0.2)
                expected[starts[row] + j, head] = weights @ wide(values[:seen, kv_head]) / weights.sum()
    contexts = torch.tensor([context for _, context in lengths], dtype=torch.int32)
    starts_tensor = torch.from_numpy(starts).int()
    out = run(q, memory[:, 1, 0], memory[:, 1, 1], tables, starts_tensor, contexts, 0.2)
    assert_close(out, expected.reshape(len(q), -1))


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
from kernels import gated_activation, linear, paged_attention, rms_norm, rope_kv_write
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
    assert paged_attention.choose_splits(num_programs, most_kv_tokens, num_multiprocessors=132) == expected


def test_wide_results_are_not_rounded_in_between() -> None:
    """Where torch serves, logits of bfloat16 must not tie by their rounding."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 96).bfloat16(), torch.randn(9000, 96).bfloat16(), torch.randn(9000).bfloat16()
    packed = linear.PackedLinear(weight, bias, 9000, 96, torch.bfloat16)
    found = linear.linear(x, packed, wide=True)
    expected = wide(x) @ wide(weight).T + wide(bias)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(wide(found), expected, rtol=1e-5, atol=1e-4)
