"""What rope_kv_write is called with, family by family, and what comes out by NumPy in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.kv_rows import LARGEST_CODE, SCALE_BYTES

QUANTISED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
NUM_POSITIONS, NUM_BLOCKS, BLOCK_TOKENS = 200, 30, 5
UNWRITTEN = 0xFF  # every byte of the KV memory before the write; a NaN in every float


@dataclasses.dataclass(frozen=True)
class Case:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rotary_offset: int = 0
    has_values: bool = True
    query_norm: bool = False
    key_norm: bool = False
    norm_offset: float = 0.0


CASES = {
    "llama": Case(9, 3, 64, 64),
    "two": Case(2, 1, 2, 2),
    "six": Case(2, 1, 6, 6),
    "80": Case(4, 4, 80, 80),
    "phi": Case(3, 1, 128, 96),
    "partial, odd": Case(2, 2, 23, 10, rotary_offset=4),
    "still": Case(2, 1, 20, 0, rotary_offset=7),
    "latent": Case(5, 1, 576, 64, rotary_offset=512, has_values=False),
    "qwen3": Case(4, 2, 128, 128, query_norm=True, key_norm=True),
    "gemma3": Case(4, 1, 256, 256, query_norm=True, key_norm=True, norm_offset=1.0),
    "normed, partial, no values": Case(3, 2, 36, 12, rotary_offset=5, has_values=False, query_norm=True, key_norm=True),
    "queries normed": Case(3, 2, 20, 20, query_norm=True),
    "keys normed": Case(3, 2, 20, 20, key_norm=True, norm_offset=1.0),
}
NORMED = [name for name, case in CASES.items() if case.query_norm and case.key_norm]


class Inputs:
    """What a case is called with; the KV memory has two layers, keys and values, and only layer 1 may be written."""

    def __init__(self, case: Case, rows: int, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(rows)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.case, self.rows = case, rows
        num_all = case.num_heads + case.num_kv_heads * (1 + case.has_values)
        self.qkv = drawn(rows, num_all * case.head_dim)
        half = case.rotary_dim // 2
        self.angles = np.outer(np.arange(NUM_POSITIONS), 10000.0 ** (-np.arange(half) / max(half, 1)))
        self.cos, self.sin = (torch.tensor(f(self.angles)).float() for f in (np.cos, np.sin))
        self.positions = torch.randint(0, NUM_POSITIONS, (rows,), generator=generator)
        self.slots = torch.randperm(NUM_BLOCKS * BLOCK_TOKENS, generator=generator)[:rows]
        row_bytes = case.head_dim * kv_dtype.itemsize + (SCALE_BYTES if kv_dtype in LARGEST_CODE else 0)
        shape = (NUM_BLOCKS, 2, 2, case.num_kv_heads, BLOCK_TOKENS, row_bytes)
        self.memory = torch.full(shape, UNWRITTEN, dtype=torch.uint8).view(kv_dtype)
        self.norms = {
            "query_norm": drawn(case.head_dim) if case.query_norm else None,
            "key_norm": drawn(case.head_dim) if case.key_norm else None,
        }
        self.options: dict[str, Any] = {"rotary_offset": case.rotary_offset}
        if case.query_norm or case.key_norm:
            self.options |= {**self.norms, "norm_eps": 0.1, "norm_offset": case.norm_offset}

    def run(self, function: Callable[..., Tensor], qkv: Tensor | None = None, **options: Any) -> Tensor:
        values = self.memory[:, 1, 1] if self.case.has_values else None
        qkv = self.qkv if qkv is None else qkv
        tables, place = (self.cos, self.sin), (self.positions, self.slots, self.memory[:, 1, 0], values)
        return function(qkv, *tables, *place, self.case.num_heads, **(options or self.options))

    def normed_by(self, norm: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        """What `run` is to be given, with no norms, for the same result: queries and keys normed and rounded before."""
        case = self.case
        heads = self.qkv.view(self.rows, -1, case.head_dim).clone()
        parts = torch.split(heads[:, : case.num_heads + case.num_kv_heads], [case.num_heads, case.num_kv_heads], dim=1)
        for weight, part in zip(self.norms.values(), parts, strict=True):
            rows = part.reshape(-1, case.head_dim)
            part.copy_(norm(rows, weight, 0.1, offset=case.norm_offset)[0].view(part.shape))
        return heads.flatten(1)

    def written(self) -> tuple[Tensor, Tensor | None]:
        """Rows of keys and values, [T, Hkv, a row]; everything else is what it was."""
        place = (self.slots // BLOCK_TOKENS, 1, slice(None), slice(None), self.slots % BLOCK_TOKENS)
        plain = self.memory.view(torch.uint8)
        rows = plain[place].clone()
        left = plain.clone()
        left[place] = UNWRITTEN
        assert (left == UNWRITTEN).all(), "written outside the slots"
        if not self.case.has_values:
            assert (rows[:, 1] == UNWRITTEN).all(), "values were written"
        keys, values = rows[:, 0], rows[:, 1]
        dtype = self.memory.dtype
        return keys.contiguous().view(dtype), values.contiguous().view(dtype) if self.case.has_values else None

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Queries and keys, [T, Hq + Hkv, D] in float64, and the sizes of the terms that each is the sum of."""
        case = self.case
        heads = wide(self.qkv).reshape(self.rows, -1, case.head_dim)[:, : case.num_heads + case.num_kv_heads].copy()
        for norm, part in zip(self.norms.values(), np.split(heads, [case.num_heads], axis=1), strict=True):
            if norm is not None:
                part *= (wide(norm) + case.norm_offset) / np.sqrt((part**2).mean(-1, keepdims=True) + 0.1)
        begin, half = case.rotary_offset, case.rotary_dim // 2
        low, high = heads[..., begin : begin + half], heads[..., begin + half : begin + 2 * half]
        # As a complex number of angle α turns (x[i], x[i + h]).
        turned = (low + 1j * high) * np.exp(1j * self.angles[self.positions.numpy()])[:, None]
        terms = np.abs(heads)
        terms[..., begin : begin + 2 * half] = np.tile(np.abs(low) + np.abs(high), 2)
        heads[..., begin : begin + half], heads[..., begin + half : begin + 2 * half] = turned.real, turned.imag
        return heads, terms


def wide(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def rows_at_the_ends(num_rows: int, head_dim: int) -> Tensor:
    """[num_rows, head_dim] fp32: ties, zeros, every size that a code can have, a scale that is subnormal or 0."""
    generator = torch.Generator().manual_seed(0)

    def integers(least: int, most: int, like: Tensor) -> Tensor:
        return torch.randint(least, most + 1, like.shape, generator=generator).float()

    rows = torch.randn(num_rows, head_dim, generator=generator) * torch.logspace(-30, 30, num_rows)[:, None]
    ties, sizes, subnormal = rows[::5], rows[1::5], rows[2::5]
    ties[:] = integers(-254, 254, ties) / 2
    ties[ties == 0] = -0.0
    ties[:, 0] = 127
    sizes[:] = integers(0, 255, sizes) * 2.0 ** integers(-21, -4, sizes)
    sizes[:, 0] = 448
    subnormal[:] = integers(-500, 500, subnormal) * 1e-44
    rows[3::15] = 0
    return rows
