"""What bench.transfer makes of its turns: which count, and what a row then says."""

from __future__ import annotations

import pytest

from bench.transfer import Row, Turn, row_of

STEADY, MOVED = Turn(4.0, 3.0, 4.4), Turn(4.0, 6.0, 2.0)


def test_a_turn_is_held_to_the_base_around_it() -> None:
    assert STEADY.ratio == pytest.approx(3.0 / 4.2)
    assert STEADY.counts
    assert not MOVED.counts
    assert Turn(4.5, 1.0, 4.0).counts
    assert not Turn(4.7, 1.0, 4.0).counts
    assert not Turn(4.0, 1.0, 4.7).counts


def test_a_row_is_of_the_turns_that_count() -> None:
    assert row_of([STEADY, MOVED]) == Row([STEADY.ratio], 1, 2)
    assert row_of([STEADY, MOVED]).is_steady


def test_an_unsteady_row_shows_all_turns_and_says_so() -> None:
    row = row_of([MOVED, STEADY, MOVED])
    assert row == Row([MOVED.ratio, STEADY.ratio, MOVED.ratio], 1, 3)
    assert not row.is_steady
