"""When a prefix is fetched: the sums, and the answer where nothing is measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.fetching import CAUTION, ROUND_TRIPS_S, is_fetch_cheaper


@pytest.mark.parametrize(
    ("num_tokens", "bytes_per_s", "seconds_per_token", "expected"),
    [
        (1000, 1e9, 1e-3, True),  # 1 s of computing, 0.1 s of moving
        (1000, 1e8, 1e-3, False),  # 1 s of either
        (1000, 1e9, 1e-5, False),  # 0.01 s of computing
        (30, 1e12, 1e-3, True),
        (10, 1e12, 1e-3, False),  # not worth the round trips
        (0, 1e9, 1e-3, False),
        (-16, 1e9, 1e-3, False),
        (1000, None, 1e-3, False),
        (1000, 1e9, None, False),
        (1000, 0.0, 1e-3, False),
    ],
)
def test_it_is_fetched_when_that_is_clearly_cheaper(
    num_tokens: int, bytes_per_s: float | None, seconds_per_token: float | None, expected: bool
) -> None:
    assert is_fetch_cheaper(num_tokens, 100_000, bytes_per_s, seconds_per_token) is expected


@given(st.integers(1, 100_000), st.floats(1e3, 1e12), st.floats(1e-7, 1.0))
def test_more_tokens_never_make_it_dearer(num_tokens: int, bytes_per_s: float, seconds_per_token: float) -> None:
    if is_fetch_cheaper(num_tokens, 1000, bytes_per_s, seconds_per_token):
        assert is_fetch_cheaper(2 * num_tokens, 1000, bytes_per_s, seconds_per_token)
        assert num_tokens * seconds_per_token > ROUND_TRIPS_S + CAUTION * num_tokens * 1000 / bytes_per_s
