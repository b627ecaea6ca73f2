"""Tables of the rotary embedding (Su et al. 2021, arXiv:2104.09864): angle[p, i] = p · theta^(-2i/D) / divisor[i].

    default   divisor 1
    linear    `factor` (Chen et al. 2023, arXiv:2306.15595)
    llama3    by wavelength (Llama 3.1; the rule is that of transformers' `_compute_llama3_parameters`)
    yarn      by the turns within the original context (Peng et al. 2023, arXiv:2309.00071, section 3.2)
    longrope  given one by one (Ding et al. 2024, arXiv:2402.13753)

cos and sin are multiplied by the attention factor. All in float64, rounded once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from spec.errors import InvalidConfiguration, InvalidModel
from spec.model import RopeSpec

_POSITIONS_AT_ONCE = 8192  # bounds the float64 intermediates of long contexts


def frequencies(rope: RopeSpec, rotary_dim: int) -> NDArray[np.float64]:
    """[rotary_dim / 2], radians per position. Raises InvalidModel where the divisors are not that many."""
    plain: NDArray[np.float64] = np.power(rope.theta, -np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    if rope.kind == "longrope":
        if len(rope.divisors) != rotary_dim // 2:
            raise InvalidModel(f"longrope has {len(rope.divisors)} factors for {rotary_dim // 2} frequencies")
        return plain / np.asarray(rope.divisors, np.float64)
    if rope.kind == "yarn":
        return plain * _yarn_multipliers(rope, rotary_dim)
    if rope.kind == "llama3":
        return plain / llama3_divisors(rope, rotary_dim)
    return plain / (rope.factor if rope.kind == "linear" else 1.0)


def llama3_divisors(rope: RopeSpec, rotary_dim: int) -> NDArray[np.float64]:
    """[rotary_dim / 2]: 1 for wavelengths below original/high_freq_factor, `factor` above original/low_freq_factor, and
    between them 1 / ((1 - s) / factor + s), s rising from 0 to 1 with the frequency."""
    wavelengths = 2 * math.pi * rope.theta ** (np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    turns = rope.original_max_positions / wavelengths
    s = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return 1.0 / ((1.0 - s) / rope.factor + s)


def _yarn_multipliers(rope: RopeSpec, rotary_dim: int) -> NDArray[np.float64]:
    """[rotary_dim / 2]: 1 for frequencies of more than beta_fast turns, 1 / factor for less than beta_slow, and between
    them a blend that is linear in the index."""

    def index_of(turns: float) -> float:
        return rotary_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    slow = np.clip((np.arange(rotary_dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    return slow / rope.factor + (1.0 - slow)


def tables(rope: RopeSpec, rotary_dim: int, num_positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [num_positions, rotary_dim / 2] float32 on the CPU.

    Raises InvalidConfiguration where there is no memory for them."""
    per_position = frequencies(rope, rotary_dim)
    try:
        cos, sin = (torch.empty(num_positions, rotary_dim // 2) for _ in range(2))
    except RuntimeError:
        raise InvalidConfiguration(
            f"there is no memory for rotary tables of {num_positions} positions; set engine.max_context_tokens"
        ) from None
    for start in range(0, num_positions, _POSITIONS_AT_ONCE):
        end = min(start + _POSITIONS_AT_ONCE, num_positions)
        angles = np.outer(np.arange(start, end, dtype=np.float64), per_position)
        cos[start:end] = torch.from_numpy(np.cos(angles) * rope.attention_factor)
        sin[start:end] = torch.from_numpy(np.sin(angles) * rope.attention_factor)
    return cos, sin
