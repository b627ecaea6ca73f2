"""RMSNorm, the gate, and rotation with the write of keys and values, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.library import Library

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
ROWS = [1, 2, 3, 7, 16, 123]


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def assert_rounded(got: Tensor, expected: np.ndarray, size: np.ndarray | float = 0.0) -> None:
    """Within one rounding of the exact result; `size` is of the terms that cancelled in fp32."""
    bound = np.abs(expected) * (ROUNDING[got.dtype] * 1.01 + 2**-21) + size * 2**-22 + 1e-38
    assert (np.abs(wide(got) - expected) <= bound).all()


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 6, 64, 577])
@pytest.mark.usefixtures("guarded", "one_thread")
def test_rms_norm(library: Library, dtype: torch.dtype, rows: int, size: int) -> None:
    x, residual = drawn(rows, size, dtype=dtype), drawn(rows, size, dtype=dtype, seed=1)
    weight = drawn(size, dtype=dtype, seed=2)
    for added in (None, residual):
        normed, stream = library.rms_norm(x, weight, 1e-5, added)
        expected_stream = x if added is None else x + added
        assert torch.equal(stream, expected_stream)
        rows64 = wide(expected_stream)
        scale = 1 / np.sqrt((rows64**2).mean(-1, keepdims=True) + 1e-5)
        assert_rounded(normed, wide(weight) * rows64 * scale)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 6, 64, 431])
@pytest.mark.usefixtures("guarded", "one_thread")
def test_silu_mul(library: Library, dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = drawn(rows, 2 * size, dtype=dtype) * 8
    gate, up = np.split(wide(gate_up), 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up
    assert_rounded(library.silu_mul(gate_up), expected, np.abs(expected * gate))  # exp takes gate's rounding times gate


def test_silu_mul_at_the_ends(library: Library) -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30])
    out = library.silu_mul(torch.cat((gate, torch.ones(6)))[None])[0]
    assert out[:2].abs().max() < 1e-8 * 1e30
    assert out[1].abs() < 1e-35
    assert torch.equal(out[3:], gate[3:])
    assert library.silu_mul(torch.tensor([[float("nan"), 1.0]])).isnan().all()


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=["kv_fp32", "kv_bf16"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (2, 1, 6), (4, 4, 80)])
@pytest.mark.usefixtures("guarded", "one_thread")
def test_rope_kv_write(
    library: Library, dtype: torch.dtype, kv_dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    half, block_tokens, num_blocks = head_dim // 2, 5, 30
    angle = np.outer(np.arange(200), 10000.0 ** (-np.arange(half) / half))
    cos, sin = torch.tensor(np.cos(angle)).float(), torch.tensor(np.sin(angle)).float()
    for rows in (1, 7, 123):
        qkv = drawn(rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
        generator = torch.Generator().manual_seed(rows)
        positions = torch.randint(0, 200, (rows,), generator=generator)
        slots = torch.randperm(num_blocks * block_tokens, generator=generator)[:rows]
        memory = torch.full((num_blocks, 2, 2, num_kv_heads, block_tokens, head_dim), 9.0, dtype=kv_dtype)
        q = library.rope_kv_write(qkv, cos, sin, positions, slots, memory[:, 1, 0], memory[:, 1, 1], num_heads)

        heads = wide(qkv).reshape(rows, -1, head_dim)
        low, high = heads[..., :half], heads[..., half:]
        c, s = wide(cos[positions])[:, None], wide(sin[positions])[:, None]
        turned = np.concatenate((low * c - high * s, high * c + low * s), axis=-1)
        terms = np.abs(np.concatenate((low, high), axis=-1)) + np.abs(np.concatenate((high, low), axis=-1))
        assert_rounded(q, turned[:, :num_heads], terms[:, :num_heads])
        place = (slots // block_tokens, 1, slice(None), slice(None), slots % block_tokens)
        written = memory[place].transpose(1, 2)  # [rows, heads, 2, head_dim]
        narrowest = written.float().to(torch.bfloat16) if torch.bfloat16 in (dtype, kv_dtype) else written
        keys = turned[:, num_heads : num_heads + num_kv_heads]
        # A key is rounded to the activations' dtype, then to the blocks': the narrower of them decides.
        assert_rounded(narrowest[:, :, 0], keys, terms[:, num_heads : num_heads + num_kv_heads])
        values = qkv.view(rows, -1, head_dim)[:, num_heads + num_kv_heads :]
        assert torch.equal(written[:, :, 1], values.to(kv_dtype))
        memory[place] = 9.0
        assert (memory == 9.0).all(), "written outside the slots"


@pytest.mark.usefixtures("one_thread")
def test_a_row_has_the_same_bits_in_any_batch(library: Library, dtype: torch.dtype) -> None:
    x, residual = drawn(300, 1234, dtype=dtype), drawn(300, 1234, dtype=dtype, seed=1)
    weight = drawn(1234, dtype=dtype, seed=2)
    normed = torch.cat([library.rms_norm(x[i : i + 1], weight, 1e-5, residual[i : i + 1])[0] for i in range(300)])
    gated = torch.cat([library.silu_mul(x[i : i + 1]) for i in range(300)])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(library.rms_norm(x, weight, 1e-5, residual)[0], normed)
        assert torch.equal(library.silu_mul(x), gated)
