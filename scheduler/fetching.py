"""Whether a prefix is fetched from another worker or computed. Pure, and conservative: it must be clearly cheaper."""

from __future__ import annotations

ROUND_TRIPS_S = 0.02  # a reservation, a call, a stream and their ends
CAUTION = 2.0  # the link is shared, and what was measured on it may have been luck


def is_fetch_cheaper(
    num_tokens: int, token_bytes: int, bytes_per_s: float | None, seconds_per_token: float | None
) -> bool:
    """Of `num_tokens` whose KV is `token_bytes` each. `bytes_per_s`: what the link to that worker was found to carry;
    `seconds_per_token`: what computing one takes here. None: not measured yet, and then the answer is no."""
    if num_tokens <= 0 or not bytes_per_s or not seconds_per_token:
        return False
    moving_s = num_tokens * token_bytes / bytes_per_s
    return ROUND_TRIPS_S + CAUTION * moving_s < num_tokens * seconds_per_token
