"""Against the known answers that ship with Random123 (kat_vectors, philox 4 32 10)."""

from __future__ import annotations

import numpy as np
import pytest

from engine.philox import philox4x32, uniform


def words(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    assert philox4x32(words(counter), words(key)) == words(expected)  # type: ignore[arg-type]


def test_uniform_is_made_of_the_two_first_words() -> None:
    first, second, _, _ = philox4x32((7, 0, 0, 0), (5, 3))
    assert uniform((3 << 32) | 5, 7) == ((first >> 5) * 2**26 + (second >> 6)) / 2**53


def test_uniform_over_seeds_and_over_positions() -> None:
    """Kolmogorov-Smirnov at 1e-6, along each of the two arguments; and all within [0, 1)."""
    for drawn in ([uniform(seed, 12) for seed in range(4000)], [uniform(99, position) for position in range(4000)]):
        ordered = np.sort(drawn)
        assert ordered[0] >= 0.0
        assert ordered[-1] < 1.0
        distance = np.abs(ordered - (np.arange(4000) + 0.5) / 4000).max()
        assert distance < 2.7 / np.sqrt(4000)


def test_large_seeds_differ_in_every_bit_that_counts() -> None:
    assert len({uniform(1 << bit, 0) for bit in range(64)}) == 64
    assert uniform(1 << 64, 0) == uniform(0, 0)
    assert len({uniform(0, 1 << bit) for bit in range(40)}) == 40
