"""Philox4x32-10 (Salmon et al., SC'11, doi:10.1145/2063384.2063405): random numbers by counter, without a state.

(L, R) of a round:  hi·lo = M0 · c0, hi'·lo' = M1 · c2;  c = (hi' ^ c1 ^ k0, lo', hi ^ c3 ^ k1, lo);  k += (W0, W1)
"""

from __future__ import annotations

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words out of a 128-bit counter and a 64-bit key, each given as 32-bit words, lowest first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: a function of the lowest 64 bits of the seed and the position alone."""
    seed &= (1 << 64) - 1
    high, low, _, _ = philox4x32((position & _MASK, position >> 32, 0, 0), (seed & _MASK, seed >> 32))
    return float((high >> 5 << 26) | (low >> 6)) / float(1 << 53)
