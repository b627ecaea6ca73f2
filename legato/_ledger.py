"""Stage times of several clocks -> a ledger that sums to what the client measured."""

from __future__ import annotations

from legato.types import Ledger

# Boundaries of legato.v1.StageTimes that the cluster takes, in order.
BEFORE_FIRST_TOKEN = ("prefill_queued_ns", "prefill_started_ns", "first_token_ns")
BEFORE_SECOND_TOKEN = ("handed_over_ns", "decode_started_ns")


def ledger_of(stages: dict[str, int], sent_unix_ns: int, ttft_ns: int, second_token_after_ns: int | None) -> Ledger:
    """`stages` holds the boundaries that were passed, unix nanoseconds. The client's own two are `sent_unix_ns` and, by
    its monotonic clock, what came `second_token_after_ns` later (None: there was no second token).

    A boundary that no one reported has a stage of length 0. A boundary lies between the one before it and the second
    token (the first token, where there is no second), and is moved there where another machine's clock says otherwise.
    """
    names = BEFORE_FIRST_TOKEN if second_token_after_ns is None else (*BEFORE_FIRST_TOKEN, *BEFORE_SECOND_TOKEN)
    end_ns = ttft_ns if second_token_after_ns is None else second_token_after_ns
    lengths_s: list[float] = []
    before_ns = 0
    largest_shift_ns = 0
    for name in names:
        reported_ns = stages.get(name, 0) - sent_unix_ns if stages.get(name, 0) else before_ns
        passed_ns = min(max(reported_ns, before_ns), end_ns)
        landed_early = name == "handed_over_ns" and reported_ns < before_ns  # blocks may land before the token is drawn
        if not landed_early:
            largest_shift_ns = max(largest_shift_ns, abs(passed_ns - reported_ns))
        lengths_s.append((passed_ns - before_ns) / 1e9)
        before_ns = passed_ns
    later: list[float | None] = [None, None, None]
    if second_token_after_ns is not None:
        later = [*lengths_s[3:], (second_token_after_ns - before_ns) / 1e9]
    return Ledger(
        route_s=lengths_s[0],
        queue_s=lengths_s[1],
        prefill_s=lengths_s[2],
        exposed_transfer_s=later[0],
        decode_queue_s=later[1],
        first_decode_step_s=later[2],
        ttft_s=ttft_ns / 1e9,
        second_token_s=None if second_token_after_ns is None else second_token_after_ns / 1e9,
        clock_shift_s=largest_shift_ns / 1e9,
    )
