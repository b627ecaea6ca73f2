"""Tables of the rotary embedding (Su et al. 2021, arXiv:2104.09864): angle[p, i] = p · theta^(-2i/D) / divisor[i].

`default` divides by 1, `linear` by `factor` (Chen et al. 2023, arXiv:2306.15595), `llama3` by what depends on the
wavelength (Llama 3.1; the rule is that of transformers' `_compute_llama3_parameters`). All in float64, rounded once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from spec.model import RopeSpec

_POSITIONS_AT_ONCE = 8192  # bounds the float64 intermediates of long contexts


def frequencies(rope: RopeSpec, head_dim: int) -> NDArray[np.float64]:
    """[head_dim / 2], radians per position."""
    plain = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "llama3":
        return plain / llama3_divisors(rope, head_dim)
    return plain / (rope.factor if rope.kind == "linear" else 1.0)


def llama3_divisors(rope: RopeSpec, head_dim: int) -> NDArray[np.float64]:
    """[head_dim / 2]: 1 for wavelengths below original/high_freq_factor, `factor` above original/low_freq_factor, and
    between them 1 / ((1 - s) / factor + s), s rising from 0 to 1 with the frequency."""
    wavelengths = 2 * math.pi * rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope.original_max_positions / wavelengths
    s = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return 1.0 / ((1.0 - s) / rope.factor + s)


def tables(rope: RopeSpec, head_dim: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [num_positions, head_dim / 2] float32 on the CPU."""
    per_position = frequencies(rope, head_dim)
    cos = torch.empty(num_positions, head_dim // 2)
    sin = torch.empty(num_positions, head_dim // 2)
    for start in range(0, num_positions, _POSITIONS_AT_ONCE):
        end = min(start + _POSITIONS_AT_ONCE, num_positions)
        angles = np.outer(np.arange(start, end, dtype=np.float64), per_position)
        cos[start:end] = torch.from_numpy(np.cos(angles))
        sin[start:end] = torch.from_numpy(np.sin(angles))
    return cos, sin
