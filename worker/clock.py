"""Two clocks: the scheduler lives on the monotonic one, the wire carries unix nanoseconds."""

from __future__ import annotations

import time


def unix_ns(monotonic_s: float) -> int:
    """The wall time at which this process's monotonic clock showed `monotonic_s`."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


def monotonic_s(unix_time_ns: int) -> float:
    """The other way round; of a deadline, say."""
    return time.monotonic() + (unix_time_ns - time.time_ns()) * 1e-9
