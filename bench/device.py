"""Seconds on one device, and what the device can do at best: for every bench that measures on a GPU."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

PEAK_FLOP_PER_S = 989e12  # H100 and H200 SXM, dense bfloat16, by the vendor's data sheet
# Of each card, the same, by a part of its name; the first that fits.
PEAKS_FLOP_PER_S = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": PEAK_FLOP_PER_S,
    "H200 NVL": 835e12,
    "H200": PEAK_FLOP_PER_S,
    "B200": 2250e12,
    "A100": 312e12,
}
# Of its memory, by the same data sheets.
PEAKS_BYTES_PER_S = {
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
    "B200": 8.0e12,
    "A100": 2.0e12,
}
FLUSH_BYTES = 512 << 20  # far more than any cache holds

Run = Callable[[], object]


def has_gpu(program: str) -> bool:
    """Where there is none, says so on standard error."""
    if torch.cuda.is_available():
        return True
    print(
        f"{program} needs an NVIDIA GPU and a torch built for it; torch {torch.__version__} sees none", file=sys.stderr
    )
    return False


def peak_of(card: str) -> float | None:
    """FLOP per second; None for a card that is not known."""
    return next((peak for name, peak in PEAKS_FLOP_PER_S.items() if name in card), None)


def memory_peak_of(card: str) -> float | None:
    """Bytes per second; None for a card that is not known."""
    return next((peak for name, peak in PEAKS_BYTES_PER_S.items() if name in card), None)


def seconds_on_device(device: torch.device, run: Run, rounds: int) -> float:
    """Median of `rounds`, after one that does not count. Caches are as the run before left them."""
    return statistics.median([_once_s(device, run) for _ in range(rounds + 1)][1:])


def _once_s(device: torch.device, run: Run) -> float:
    if device.type == "cpu":
        started_s = time.perf_counter()
        run()
        return time.perf_counter() - started_s
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def interleaved_s(device: torch.device, runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of `rounds`: all take their turn in each round, in an order that goes round.

    On a GPU the caches are emptied before each turn. That is done by reading: what a write leaves in the cache would
    be written back at the cost of whoever comes next. It takes longer than a launch, so that launches are not timed.
    """
    unread = None if device.type == "cpu" else torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for round_number in range(rounds):
        first = round_number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            if unread is not None:
                unread.sum()
            times[name].append(_once_s(device, runs[name]))
    return times


def captured(device: torch.device, run: Run) -> tuple[Run, bool]:
    """What runs it, and whether that is a CUDA graph: many small launches then wait for no host. Warms it up there."""
    if device.type == "cpu":
        return run, False
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:  # it waits for the device itself
        torch.cuda.synchronize()
        return run, False
    return graph.replay, True


def quartiles(times_s: Sequence[float]) -> tuple[float, float]:
    if len(times_s) < 2:
        return times_s[0], times_s[0]
    low_s, _, high_s = statistics.quantiles(times_s, n=4, method="inclusive")
    return low_s, high_s


def copy_bandwidth(device: torch.device, copy_bytes: int, rounds: int) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(copy_bytes // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * copy_bytes / seconds_on_device(device, lambda: target.copy_(source), rounds)


def product_rate(device: torch.device, size: int, rounds: int) -> float:
    """FLOP per second of a square bfloat16 product by the vendor's library."""
    x = torch.randn(size, size, device=device).bfloat16()
    out = torch.empty_like(x)
    return 2 * size**3 / seconds_on_device(device, lambda: torch.mm(x, x, out=out), rounds)


def fp8_product_rate(device: torch.device, size: int, rounds: int) -> float:
    """FLOP per second of a square product of fp8 E4M3 with one scale each, by the vendor's library."""
    x = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)

    def run() -> object:
        return torch._scaled_mm(x, x.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / seconds_on_device(device, run, rounds)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Measured, and by the data sheet; None where the device has no such thing or the card is not known."""

    copy_bytes_per_s: float
    product_flop_per_s: float
    fp8_flop_per_s: float | None
    sheet_bytes_per_s: float | None
    sheet_flop_per_s: float | None


def measure_limits(device: torch.device, card: str, copy_bytes: int, product_size: int, rounds: int) -> Limits:
    """product_size: a multiple of 16."""
    try:
        fp8 = fp8_product_rate(device, product_size, rounds)
    except (RuntimeError, NotImplementedError):  # an A100 has no such product
        fp8 = None
    return Limits(
        copy_bandwidth(device, copy_bytes, rounds),
        product_rate(device, product_size, rounds),
        fp8,
        memory_peak_of(card),
        peak_of(card),
    )
