"""Seconds and rates of one device: what it can do at best, and what an engine makes of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from engine.engine import Engine
from scheduler.plan import Draw, Slice, StepPlan
from spec.sampling import SamplingParams

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


def peak_of(card: str) -> float | None:
    """FLOP per second; None for a card that is not known."""
    return next((peak for name, peak in PEAKS_FLOP_PER_S.items() if name in card), None)


def seconds_on_device(device: torch.device, run: Callable[[], object], rounds: int) -> float:
    """Median of `rounds`, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        if device.type == "cpu":
            started_s = time.perf_counter()
            run()
            times.append(time.perf_counter() - started_s)
            continue
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return statistics.median(times[1:])


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


def decode_step_s(engine: Engine, batch: int, context_tokens: int, num_steps: int) -> float:
    """Median seconds of a greedy step of `batch` sequences. What lies in the KV memory is what they have computed."""
    greedy = SamplingParams(temperature=0.0)
    each = engine.kv.layout.blocks_for(context_tokens + num_steps + 3)
    if batch * each > engine.kv.num_blocks:
        raise MemoryError(f"{batch} sequences of {context_tokens} tokens take {batch * each} blocks")
    tables = [tuple(range(row * each, (row + 1) * each)) for row in range(batch)]
    drawn, times = [7] * batch, []
    for start in range(context_tokens, context_tokens + num_steps + 3):
        slices = tuple(
            Slice(str(row), (token_id,), start, table, Draw(greedy, start + 1, context_tokens, ()))
            for row, (token_id, table) in enumerate(zip(drawn, tables, strict=True))
        )
        started_s = time.perf_counter()
        result = engine.execute(StepPlan(0, slices))
        times.append(time.perf_counter() - started_s)
        drawn = [found.token_id for (found,) in result.drawn]
        if min(drawn) < 0:
            raise ArithmeticError("a row of logits has no finite maximum")
    return statistics.median(times[3:])


def prefill_s(engine: Engine, num_tokens: int, rounds: int) -> float:
    greedy = SamplingParams(temperature=0.0)
    tokens = tuple(index % 1000 for index in range(num_tokens))
    table = tuple(range(engine.kv.layout.blocks_for(num_tokens)))
    plan = StepPlan(0, (Slice("a", tokens, 0, table, Draw(greedy, num_tokens, num_tokens, ())),))
    times = []
    for _ in range(rounds + 1):
        started_s = time.perf_counter()
        engine.execute(plan)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])


def hand_over_bandwidth(engine: Engine, num_tokens: int, rounds: int) -> float:
    """Bytes of KV per second."""
    layout, memory = engine.kv.layout, engine.kv.tensor
    index = torch.randperm(engine.kv.num_blocks, device=memory.device)[: layout.blocks_for(num_tokens)]
    landing = torch.empty(len(index), *memory.shape[1:], dtype=memory.dtype, device=memory.device)
    seconds = seconds_on_device(memory.device, lambda: torch.index_select(memory, 0, index, out=landing), rounds)
    return len(index) * layout.block_bytes / seconds
