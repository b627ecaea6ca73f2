"""The numbers of the race, written out once more: SplitMix64 as its paper has it, on Python's own integers."""

from __future__ import annotations

from collections.abc import Iterator

WORD = (1 << 64) - 1


def split_mix(state: int) -> Iterator[int]:
    while True:
        state = (state + 0x9E3779B97F4A7C15) & WORD
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
        yield z ^ (z >> 31)


def output(state: int, index: int) -> int:
    """From 0 on."""
    return next(split_mix((state + index * 0x9E3779B97F4A7C15) & WORD))


def number_of(seed: int, position: int, token_id: int) -> float:
    """In (0, 1)."""
    word = output(output(output(seed & WORD, 0), position), token_id)
    return (2 * (word >> 12) + 1) / 2.0**53
