"""Seconds of an engine's steps."""

from __future__ import annotations

import statistics
import time

from engine.engine import Engine
from scheduler.plan import Draw, Slice, StepPlan
from spec.sampling import SamplingParams


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
