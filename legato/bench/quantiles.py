"""Exact percentiles: of the samples themselves, no buckets and no sketches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """In the unit of the samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def quantile(ordered: Sequence[float], share: float) -> float:
    """Of samples in ascending order, at least one; `share` in 0 to 1. Linear between the two nearest ranks, which is
    type 7 of Hyndman and Fan (1996) and NumPy's default."""
    assert ordered and 0.0 <= share <= 1.0
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def summary(samples: Iterable[float]) -> Summary | None:
    """None where there is no sample: no figure is better than a made-up one."""
    ordered = sorted(samples)
    if not ordered:
        return None
    mean = math.fsum(ordered) / len(ordered)
    p50, p90, p99 = (quantile(ordered, share) for share in (0.5, 0.9, 0.99))
    return Summary(len(ordered), mean, p50, p90, p99, ordered[-1])
