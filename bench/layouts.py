"""Layouts of several processes against one process: tokens per second of decode, the bubble of each stage, and the
weights that a rank holds.

Each side runs what a worker runs (scheduler, executor, rank processes), one thread a process, without gRPC; turn by
turn in each round. Timed is from the moment when every sequence has its first token to the end. The bubble share of a
stage is the part of that time in which it waited while steps were out; it falls with the steps that are out at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.record import append_line
from engine.profiling import weight_bytes
from scheduler.sequence import Sequence
from service.config import EngineConfig, WorkerConfig
from spec.layout import ParallelLayout
from spec.sampling import SamplingParams
from telemetry.setup import setup
from worker.build import build_core
from worker.core import Core
from worker.executor import AllRanks
from worker.lanes import Lanes
from worker.loop import EngineLoop

EXAMPLES = """examples:
  python -m bench.layouts                                    SmolLM2, pp 2 on two cores, a few minutes
  python -m bench.layouts --batches 8 32 --micro-batches 2 --rounds 5
  python -m bench.layouts --layouts pp4 --model ./Llama-3.2-1B
  python -m bench.layouts --layouts tp2 dp2 dp2-stage --batches 8 32
"""


ALONE = "tp1"


class Case(NamedTuple):
    batch: int
    layout: str
    steps_out: int  # at once


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    tokens_per_s: float
    bubbles: tuple[float, ...]  # share of each stage
    ratio: float = 1.0  # to one process in the same round


def main() -> None:
    options = parse_arguments()
    alone = core_of(ALONE, options)
    turns, weights = dict[Case, list[Turn]](), {ALONE: weight_bytes(alone.engine.decoder.weights)}
    try:
        for layout in options.layouts:  # one at a time: a process can be of one worker's ranks alone
            ranks = core_of(layout, options)
            try:
                weights[layout] = weight_bytes(ranks.engine.decoder.weights)
                measure(alone, ranks, layout, turns, options)
            finally:
                ranks.close()
    finally:
        alone.close()
    report(turns, weights, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.layouts",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or smollm2 (default: %(default)s)")
    parser.add_argument("--layouts", nargs="+", default=["pp2"], help="of several processes (default: pp2)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--quantisation",
        default="auto",
        choices=("auto", "none", "int8", "int4", "fp8"),
        help="of the weights; auto: as they are stored (default: %(default)s)",
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32], help="sequences (default: 8 16 32)")
    parser.add_argument(
        "--micro-batches", type=int, nargs="+", default=[1, 2, 4], help="out at once with pp (default: 1 2 4)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/layouts.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


def core_of(layout: str, options: argparse.Namespace) -> Core:
    engine = EngineConfig(
        model=options.model,
        dtype=options.dtype,
        quantisation=options.quantisation,
        device="cpu",
        threads=1,
        layout=layout,
        max_sequences=max(options.batches),
        max_step_tokens=max(512, *options.batches),
    )
    config = WorkerConfig(
        role="decode", redis_url="redis://nobody", cluster_key="a key for a bench", engine=engine, worker_id=layout
    )
    core = build_core(config, setup("bench", None, ""), lambda what, fraction: None)
    core.loop = EngineLoop(core.scheduler, core.executor, lambda events: None, lambda failure: None)  # never started
    return core


def measure(alone: Core, ranks: Core, layout: str, turns: dict[Case, list[Turn]], options: argparse.Namespace) -> None:
    """Puts what it finds into `turns`."""
    assert isinstance(ranks.executor, AllRanks)
    torch.set_num_threads(1)
    for batch in options.batches:
        for number in range(options.rounds):
            base = run(alone, 1, batch, options, number)
            turns.setdefault(Case(batch, ALONE, 1), []).append(base)
            for steps_out in options.micro_batches if ParallelLayout.parse(layout).pp > 1 else (1,):
                ranks.executor.steps_out = steps_out
                turn = run(ranks, steps_out, batch, options, number)
                turn = dataclasses.replace(turn, ratio=turn.tokens_per_s / base.tokens_per_s)
                turns.setdefault(Case(batch, layout, steps_out), []).append(turn)


def run(core: Core, steps_out: int, batch: int, options: argparse.Namespace, number: int) -> Turn:
    draw = random.Random(f"{options.seed} {batch} {number}")
    lanes = Lanes.of(dataclasses.replace(each.config, steps_out=steps_out) for each in core.scheduler.schedulers)
    params = SamplingParams(max_tokens=options.tokens, temperature=0.0, ignore_eos=True)
    for index in range(batch):
        prompt = tuple(draw.randrange(core.record.vocab_size) for _ in range(options.prompt_tokens))
        lanes.add(Sequence(f"{index}", prompt, [], params), 0.0)
    drive(core, lanes, steps_out, until_generated=batch)
    before, generated, started_s = core.executor.totals(), lanes.totals()["generated_tokens"], time.perf_counter()
    drive(core, lanes, steps_out, until_generated=None)
    seconds = time.perf_counter() - started_s
    tokens = lanes.totals()["generated_tokens"] - generated
    return Turn(tokens / seconds, bubbles(before, core.executor.totals()))


def drive(core: Core, lanes: Lanes, steps_out: int, until_generated: int | None) -> None:
    """As the engine loop does; every step that is out is taken before it returns."""
    out = []
    while True:
        more = until_generated is None or lanes.totals()["generated_tokens"] < until_generated
        plans = lanes.plan(0.0) if more and len(out) < steps_out else None
        if plans is not None:
            core.executor.submit(plans)
            out.append(plans)
            if len(out) < steps_out:
                continue
        if not out:
            return
        lanes.commit(out.pop(0), core.executor.result(), 0.0)


def bubbles(before: dict[str, int], after: dict[str, int]) -> tuple[float, ...]:
    found = []
    for stage in range(len(after) // 2):
        busy, idle = (
            after[f"stage_{stage}_{kind}_us"] - before[f"stage_{stage}_{kind}_us"] for kind in ("busy", "idle")
        )
        found.append(idle / (busy + idle))
    return tuple(found)


def report(turns: dict[Case, list[Turn]], weights: dict[str, int], options: argparse.Namespace) -> None:
    of = f"{options.model} {options.dtype}, weights {options.quantisation}"
    table = Table(title=f"{of}: decode, one thread a process; medians of {options.rounds} rounds")
    columns = ("batch", "layout", "steps out", "tokens/s", "to one process", "bubble of each stage", "rank 0, MiB")
    for name in columns:
        table.add_column(name, justify="right")
    results = []
    for case, each in sorted(turns.items()):
        ratios = [turn.ratio for turn in each]
        shares = [statistics.median(shares) for shares in zip(*(turn.bubbles for turn in each), strict=True)]
        speed, ratio = statistics.median(turn.tokens_per_s for turn in each), statistics.median(ratios)
        bubbles_said, mib = "  ".join(f"{share:.0%}" for share in shares), f"{weights[case.layout] / 2**20:.0f}"
        table.add_row(*map(str, case), f"{speed:.1f}", f"{ratio:.2f}", bubbles_said, mib)
        results.append(
            {
                **case._asdict(),
                "tokens_per_s": [turn.tokens_per_s for turn in each],
                "ratios": ratios,
                "bubbles": shares,
                "weight_bytes_of_rank_0": weights[case.layout],
            }
        )
    Console().print(table)
    append_line(options.results, "layouts", options, results)


if __name__ == "__main__":
    main()
