"""What the router measures of its own work: counts for `legato top`, quantiles over recent requests, histograms."""

from __future__ import annotations

import collections
from collections.abc import Iterable

from legato.v1 import inference_pb2
from telemetry import names
from telemetry.setup import Telemetry

RECENT_REQUESTS = 512
RECENT_GAPS = 4096


class Meter:
    """`running_requests` are those the router has taken and not ended, those in its line included."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.running_requests = 0
        self.finished_requests = 0
        self.failed_requests = 0
        self.ttft_s: collections.deque[float] = collections.deque(maxlen=RECENT_REQUESTS)
        self.itl_s: collections.deque[float] = collections.deque(maxlen=RECENT_GAPS)
        self._ttft = telemetry.histograms[names.TTFT.name]
        self._itl = telemetry.histograms[names.ITL.name]
        self._duration = telemetry.histograms[names.REQUEST_DURATION.name]
        self._requests = telemetry.counters[names.REQUESTS.name]

    def first_token(self, seconds: float) -> None:
        self.ttft_s.append(seconds)
        self._ttft.record(seconds)

    def gap(self, seconds: float) -> None:
        self.itl_s.append(seconds)
        self._itl.record(seconds)

    def ended(self, reason: str, seconds: float) -> None:
        """`reason` is "" for an answer that is complete, the error's name otherwise."""
        if reason:
            self.failed_requests += 1
        else:
            self.finished_requests += 1
        self._requests.add(1, {names.ERROR_REASON: reason or "OK"})
        self._duration.record(seconds)


def quantiles(seconds: Iterable[float]) -> inference_pb2.GetClusterResponse.Quantiles:
    """Nearest rank: a value that was measured, not one between two. All 0 where nothing was."""
    ordered = sorted(seconds)
    if not ordered:
        return inference_pb2.GetClusterResponse.Quantiles()
    p50, p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
    return inference_pb2.GetClusterResponse.Quantiles(p50=p50, p90=p90, p99=p99, count=len(ordered))
