"""How much of the time in which a worker had work each pipeline stage was busy: the rest is the pipeline's bubble.

A stage's time is the mean of its ranks'. On a GPU a rank is done with a step when it has issued it: there these are
times of the host.
"""

from __future__ import annotations

import time

from telemetry import names
from telemetry.setup import Telemetry


class StageTimes:
    """Used by the engine loop's thread; `totals` may be read by any."""

    def __init__(self, num_stages: int, telemetry: Telemetry) -> None:
        self._busy_s = [0.0] * num_stages
        self._counted_s = [(0.0, 0.0)] * num_stages  # (busy, idle) as they were recorded
        self._worked_s = 0.0  # steps were out, before `_since_s`
        self._since_s: float | None = None  # steps are out
        self._counters = telemetry.counters

    def submitted(self) -> None:
        """A step is out now."""
        if self._since_s is None:
            self._since_s = time.monotonic()

    def busy(self, stage: int, seconds: float) -> None:
        self._busy_s[stage] += seconds

    def taken(self, *, is_last: bool) -> None:
        """A step's result was taken; `is_last`: none is out any more."""
        assert self._since_s is not None
        now_s = time.monotonic()
        self._worked_s += now_s - self._since_s
        self._since_s = None if is_last else now_s
        for stage, busy_s in enumerate(self._busy_s):
            was_busy_s, was_idle_s = self._counted_s[stage]
            idle_s = max(was_idle_s, self._worked_s - busy_s)  # of steps that are out more is known later
            self._counters[names.STAGE_BUSY.name].add(busy_s - was_busy_s, {"stage": stage})
            self._counters[names.STAGE_IDLE.name].add(idle_s - was_idle_s, {"stage": stage})
            self._counted_s[stage] = busy_s, idle_s

    def totals(self) -> dict[str, int]:
        """Microseconds. The bubble share of a stage is idle / (busy + idle)."""
        found = {}
        for stage, (busy_s, idle_s) in enumerate(list(self._counted_s)):
            found[f"stage_{stage}_busy_us"], found[f"stage_{stage}_idle_us"] = int(busy_s * 1e6), int(idle_s * 1e6)
        return found
