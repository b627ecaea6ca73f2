"""What a link does, measured once when two workers meet, and what that says about which to take."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from kvtransfer.transport import Peer, Piece, Region
from spec.errors import TransferFailed

PROBE_BYTES = 1 << 20  # at most; a link that is slow is asked for less
ENOUGH_S = 0.01  # a write that takes this long says what there is to know
TIMEOUT_S = 5.0
TYPICAL_BYTES = 4 << 20  # of a chunk's KV
CLEARLY = 2.0  # a measurement on a busy machine is worth no more than that
_RDMA_PREFIXES = ("rc_", "dc_", "ud_")


class Measured(NamedTuple):
    latency_s: float
    bytes_per_s: float

    def time_s(self, nbytes: int) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


def measure(peer: Peer, source: Region, source_offset: int, target_offset: int) -> Measured:
    """Writes PROBE_BYTES or less, where nobody minds. Waits. Raises TransferFailed."""

    def timed(nbytes: int) -> float:
        started_s = time.perf_counter()
        try:
            peer.post(source, [Piece(source_offset, target_offset, nbytes)]).result(TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            raise TransferFailed(f"{nbytes} bytes did not land in {TIMEOUT_S} s") from None
        return time.perf_counter() - started_s

    latency_s = min(timed(1) for _ in range(3))
    nbytes = PROBE_BYTES >> 4
    took_s = timed(nbytes)
    while took_s < ENOUGH_S and nbytes < PROBE_BYTES:
        nbytes *= 4
        took_s = timed(nbytes)
    if took_s < ENOUGH_S:
        took_s = min(took_s, timed(nbytes), timed(nbytes))
    return Measured(latency_s, nbytes / max(took_s - latency_s, took_s / 10))


def ranked(names: Sequence[str], measured: Mapping[str, Measured], failed: Collection[str] = ()) -> list[str]:
    """`names` as configured, best first; but one that was measured to be clearly faster goes before those, and those
    whose measurement failed come last."""
    ranks: list[str] = []
    for name in (name for name in names if name not in failed):
        place = len(ranks)
        while place and name in measured and (before := measured.get(ranks[place - 1])) is not None:
            if CLEARLY * measured[name].time_s(TYPICAL_BYTES) >= before.time_s(TYPICAL_BYTES):
                break
            place -= 1
        ranks.insert(place, name)
    return ranks + [name for name in names if name in failed]


def is_rdma(runs_over: str) -> bool:
    return any(name.startswith(_RDMA_PREFIXES) for name in runs_over.split(", "))


def rdma_devices(folder: Path = Path("/sys/class/infiniband")) -> list[str]:
    """Of this host, by name: InfiniBand and RoCE."""
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
