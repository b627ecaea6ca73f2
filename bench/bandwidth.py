"""How fast this machine's memory is read: a limit for decode, and a probe that tells whether the machine is quiet."""

from __future__ import annotations

import time

import torch

from kernels.cpu.library import shared_library

PROBE_BYTES = 1 << 29  # far more than the caches hold


def probe_memory() -> torch.Tensor:
    return torch.ones(PROBE_BYTES // 8, dtype=torch.int64)


def read_bandwidth(memory: torch.Tensor) -> float:
    """Bytes per second, best of three readings: a limit, so that the best counts."""
    library, times = shared_library(), []
    for _ in range(3):
        started = time.perf_counter()
        if library is None:
            memory.sum()
        else:
            library.read_bytes(memory)
        times.append(time.perf_counter() - started)
    return memory.numel() * memory.element_size() / min(times)
