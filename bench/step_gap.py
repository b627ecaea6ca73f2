"""The time between two decode steps in which a device would wait for the host, with plans made ahead and without.

From the logits of a step to the moment when the work of the next one is under way: draw, take the result, commit, plan,
make the inputs. On the CPU the host is the device, and what is done `meanwhile` comes in between all the same; so the
clock stops where `meanwhile` begins, as it would on a GPU. The engine loop is the one that serves, with its threads;
what it tells is dropped. Interleaved; medians over all steps of all rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.record import append_line
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from scheduler.config import SchedulerConfig
from scheduler.events import Event, Tokens
from scheduler.plan import StepPlan
from scheduler.sequence import Sequence as Running
from service.model_source import resolve_model
from spec.sampling import SamplingParams
from telemetry.setup import setup
from worker.executor import OneRank
from worker.lanes import Lanes
from worker.loop import EngineLoop
from worker.meter import Meter
from worker.watch import StepWatch

WAYS = ("behind", "ahead")


@dataclasses.dataclass(frozen=True, slots=True)
class Gaps:
    """Of the steps in which all sequences decode."""

    seconds: list[float]
    step_s: list[float]  # the step behind each gap


class NeverAhead(Lanes):
    def plan_ahead(self, now_s: float) -> None:
        return None


class Stamped(OneRank):
    """Notes when logits are there, and when the next step is under way."""

    def __init__(self, engine: Engine, batch: int) -> None:
        super().__init__(engine, Meter(setup("bench")))
        self.gaps = Gaps([], [])
        self._decoder, self._batch = engine.decoder, batch
        self._logits, self._ready_s = engine.decoder.logits, 0.0

    def __enter__(self) -> Stamped:
        self._decoder.logits = self._timed  # type: ignore[method-assign]
        return self

    def __exit__(self, *_exception: object) -> None:
        del self._decoder.logits

    def _timed(self, hidden: object) -> object:
        logits = self._logits(hidden)  # type: ignore[arg-type]
        self._ready_s = time.perf_counter()
        return logits

    def submit(
        self, plans: Sequence[StepPlan], watch: StepWatch | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        ready_s, begun_s = self._ready_s, 0.0

        def stamped() -> None:
            nonlocal begun_s
            begun_s = time.perf_counter()
            meanwhile()

        super().submit(plans, watch, stamped)
        if ready_s and plans[0].num_tokens == self._batch:
            self.gaps.seconds.append(begun_s - ready_s)
            self.gaps.step_s.append(self._ready_s - begun_s)


def main() -> None:
    options = parse_arguments()
    most = max(options.batch)
    blocks = most * (-(-(options.context_tokens + options.steps + 2) // 16) + 1)
    engine_options = EngineOptions(device="cpu", threads=options.threads)
    engine = Engine(open_model(resolve_model(options.model)), engine_options, blocks)
    engine.warm_up()
    found: dict[tuple[int, str], Gaps] = {(batch, way): Gaps([], []) for batch in options.batch for way in WAYS}
    for number in range(options.rounds):
        for batch in options.batch:
            for way in WAYS:
                gaps = run(engine, batch, way, options, number)
                found[batch, way].seconds.extend(gaps.seconds)
                found[batch, way].step_s.extend(gaps.step_s)
    report(found, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step_gap", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or smollm2 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="A-B pairs (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="sequences (default: 1 8 64)")
    parser.add_argument("--context-tokens", type=int, default=128, help="before decode begins (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="of one measurement (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/step_gap.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


def run(engine: Engine, batch: int, way: str, options: argparse.Namespace, number: int) -> Gaps:
    config = SchedulerConfig(
        num_blocks=engine.kv.num_blocks,
        block_tokens=engine.kv.layout.block_tokens,
        max_step_tokens=batch * options.context_tokens,
        max_sequences=batch,
        max_context_tokens=engine.spec.max_context_tokens,
    )
    lanes = (Lanes if way == "ahead" else NeverAhead).of([config])
    draw = random.Random(f"{options.seed} {batch} {number}")
    params = SamplingParams(max_tokens=options.steps, temperature=0.0, ignore_eos=True)
    for index in range(batch):
        prompt = tuple(draw.randrange(engine.spec.vocab_size) for _ in range(options.context_tokens))
        lanes.add(Running(str(index), prompt, [], params), time.monotonic())
    over, left = threading.Event(), batch

    def deliver(events: Sequence[Event]) -> None:
        nonlocal left
        left -= sum(isinstance(event, Tokens) and event.finish is not None for event in events)
        if left == 0:
            over.set()

    with Stamped(engine, batch) as executor:
        loop = EngineLoop(lanes, executor, deliver, lambda failure: over.set())
        loop.start()
        over.wait()
        loop.stop()
    if loop.failure is not None:
        raise loop.failure
    return executor.gaps


def report(found: dict[tuple[int, str], Gaps], options: argparse.Namespace) -> None:
    table = Table("batch", "planned", "gap, us", "p90", "saved, us", "a step, ms", title=options.model)
    rows = []
    for (batch, way), gaps in found.items():
        gap_us, p90_us = (float(np.percentile(gaps.seconds, at)) * 1e6 for at in (50, 90))
        step_ms = statistics.median(gaps.step_s) * 1e3
        saved = "" if way == "behind" else f"{statistics.median(found[batch, 'behind'].seconds) * 1e6 - gap_us:.0f}"
        table.add_row(str(batch), way, f"{gap_us:.0f}", f"{p90_us:.0f}", saved, f"{step_ms:.1f}")
        rows.append({"batch": batch, "planned": way, "gap_us": gap_us, "p90_us": p90_us, "step_ms": step_ms})
    Console().print(table)
    append_line(options.results, "step_gap", options, rows)


if __name__ == "__main__":
    main()
