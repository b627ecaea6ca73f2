"""Continuous against static batching with our engine under our scheduler, and what the scheduler itself costs.

Requests arrive at once, with prompts of one length and answers of many (log-uniform, drawn from the seed):

    continuous        as it serves: who is done leaves, who waits takes the place in the next step
    static            groups of as many as run at once; a group runs, all its rows, until its longest answer is there
    static, shrinking the same groups, but who is done leaves and only the place stays empty

Tokens that were asked for, by the time all had them; interleaved in one run, medians of rounds and their spread. The
scheduler's share is that of planning and committing in the time of a step of decodes, all places taken.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.bandwidth import probe_memory, read_bandwidth
from bench.record import append_line
from bench.timed_loop import Step, TimedLoop
from engine.engine import EngineOptions
from engine.model_files import open_model
from service.model_source import resolve_model

STEPS = 256  # of the decodes whose scheduling is timed
EXAMPLES = """examples:
  python -m bench.batching                                     SmolLM2, 16 at once, about six minutes
  python -m bench.batching --max-sequences 32 --requests 192
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    prompt: list[int]
    num_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One way through all requests."""

    seconds: float
    num_steps: int
    mean_rows: float  # of a step
    scheduler_share: float  # of the time of all steps


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    files, draw = open_model(resolve_model(options.model)), random.Random(options.seed)
    engine_options = EngineOptions(dtype=options.dtype, device="cpu", threads=options.threads)

    def timed_loop(max_sequences: int, num_tokens: int, prefix_caching: bool) -> TimedLoop:
        return TimedLoop(
            files,
            engine_options,
            max_sequences=max_sequences,
            max_tokens=options.prompt_tokens + num_tokens + 1,
            max_step_tokens=max(options.max_step_tokens, max_sequences),
            prefix_caching=prefix_caching,
        )

    def requests(lengths: Sequence[int]) -> list[Request]:
        vocab = range(3, files.spec.vocab_size)
        return [Request(draw.choices(vocab, k=options.prompt_tokens), length) for length in lengths]

    count = options.scheduler_batch
    decodes = full_decodes(timed_loop(count, STEPS, True), requests([STEPS] * count))
    lengths = [drawn_length(draw, options.shortest, options.longest) for _ in range(options.requests)]
    asked = requests(lengths)
    runs, bandwidths = measure(timed_loop(options.max_sequences, options.longest, False), asked, options)
    report(runs, bandwidths, decodes, asked, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.batching",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or smollm2 (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of each way (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=96, help="in all (default: %(default)s)")
    parser.add_argument("--max-sequences", type=int, default=16, help="places in the batch (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each prompt (default: %(default)s)")
    parser.add_argument("--shortest", type=int, default=16, help="answer, in tokens (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=512, help="answer, in tokens (default: %(default)s)")
    parser.add_argument("--max-step-tokens", type=int, default=512, help="the chunk size (default: %(default)s)")
    parser.add_argument(
        "--scheduler-batch",
        type=int,
        default=64,
        help="decodes in a step whose scheduling is timed (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and lengths (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/batching.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


def drawn_length(draw: random.Random, shortest: int, longest: int) -> int:
    """Log-uniform: as many between 16 and 32 as between 256 and 512."""
    return min(longest, int(math.exp(draw.uniform(math.log(shortest), math.log(longest + 1)))))


# ---- three ways through the same requests ----------------------------------------------------------------------------


def continuous(requests: Sequence[Request], max_sequences: int) -> Iterator[list[Request]]:
    """Each yields what is handed to the scheduler at once; the next comes when nothing is left of it."""
    yield list(requests)


def static(requests: Sequence[Request], max_sequences: int) -> Iterator[list[Request]]:
    for group in static_shrinking(requests, max_sequences):
        longest = max(request.num_tokens for request in group)
        yield [Request(request.prompt, longest) for request in group]


def static_shrinking(requests: Sequence[Request], max_sequences: int) -> Iterator[list[Request]]:
    for first in range(0, len(requests), max_sequences):
        yield list(requests[first : first + max_sequences])


Way = Callable[[Sequence[Request], int], Iterator[list[Request]]]
WAYS: dict[str, Way] = {"continuous": continuous, "static": static, "static, shrinking": static_shrinking}


def run(timed_loop: TimedLoop, groups: Iterator[list[Request]]) -> Run:
    started_s, steps = time.perf_counter(), []
    for group in groups:
        for request in group:
            timed_loop.add(request.prompt, request.num_tokens)
        while (step := timed_loop.step()) is not None:
            steps.append(step)
    return Run(
        seconds=time.perf_counter() - started_s,
        num_steps=len(steps),
        mean_rows=statistics.mean(step.num_sequences for step in steps),
        scheduler_share=sum(step.scheduler_s for step in steps) / sum(step.total_s for step in steps),
    )


def measure(
    timed_loop: TimedLoop, requests: Sequence[Request], options: argparse.Namespace
) -> tuple[dict[str, list[Run]], list[float]]:
    """Every round of each way, and the memory read bandwidth before each and at the end, in bytes per second."""
    memory, runs, bandwidths = probe_memory(), {name: [] for name in WAYS}, []  # type: ignore[var-annotated]
    for number in range(options.rounds):
        for name, way in WAYS.items():
            print(f"\rround {number + 1}/{options.rounds}, {name:20}", end="", file=sys.stderr, flush=True)
            bandwidths.append(read_bandwidth(memory))
            runs[name].append(run(timed_loop, way(requests, options.max_sequences)))
    bandwidths.append(read_bandwidth(memory))
    print(file=sys.stderr)
    return runs, bandwidths


# ---- the scheduler itself --------------------------------------------------------------------------------------------


def full_decodes(timed_loop: TimedLoop, requests: Sequence[Request]) -> list[Step]:
    """Steps in which every request has one token computed, and no other has any."""
    for request in requests:
        timed_loop.add(request.prompt, request.num_tokens)
    steps = []
    while (step := timed_loop.step()) is not None:
        if step.num_sequences == step.num_tokens == len(requests):
            steps.append(step)
    return steps


# ---- what came of it -------------------------------------------------------------------------------------------------


def report(
    runs: dict[str, list[Run]],
    bandwidths: Sequence[float],
    decodes: Sequence[Step],
    requests: Sequence[Request],
    options: argparse.Namespace,
) -> None:
    num_tokens = sum(request.num_tokens for request in requests)
    title = f"{options.model}: {len(requests)} requests, {num_tokens} tokens, {options.max_sequences} at once"
    table = Table("", "tokens/s", "steps", "rows a step", "continuous is faster", "rounds", title=title)
    rows = {}
    for name, of_this in runs.items():
        rates = [num_tokens / one.seconds for one in of_this]
        ratios = [one.seconds / ours.seconds for one, ours in zip(of_this, runs["continuous"], strict=True)]
        rate, ratio = statistics.median(rates), statistics.median(ratios)
        rows[name] = {"tokens_per_s": rate, "ratio": ratio, "rounds": [dataclasses.asdict(one) for one in of_this]}
        shown = ("", "") if name == "continuous" else (f"× {ratio:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}")
        table.add_row(name, f"{rate:.0f}", f"{of_this[0].num_steps}", f"{of_this[0].mean_rows:.1f}", *shown)
    shares = [step.scheduler_s / step.total_s for step in decodes]
    times_s = [step.scheduler_s for step in decodes]
    scheduler = {
        "batch": options.scheduler_batch,
        "steps": len(decodes),
        "share_p50": float(np.percentile(shares, 50)),
        "share_p99": float(np.percentile(shares, 99)),
        "s_p50": float(np.percentile(times_s, 50)),
        "s_p99": float(np.percentile(times_s, 99)),
        "step_s_p50": statistics.median(step.total_s for step in decodes),
    }
    console = Console()
    console.print(table)
    console.print(
        f"the scheduler, {options.scheduler_batch} decodes: {scheduler['s_p50'] * 1e6:.0f} us a step, p99"
        f" {scheduler['s_p99'] * 1e6:.0f} us; {scheduler['share_p50']:.1%} of a step of"
        f" {scheduler['step_s_p50'] * 1e3:.1f} ms, p99 {scheduler['share_p99']:.1%}"
    )
    share = statistics.median(one.scheduler_share for one in runs["continuous"])
    console.print(f"the scheduler in all of continuous batching: {share:.1%}")
    console.print(f"memory was read at {min(bandwidths) / 1e9:.1f} to {max(bandwidths) / 1e9:.1f} GB/s meanwhile")
    append_line(options.results, "batching", options, rows, scheduler=scheduler, bandwidths_bytes_per_s=bandwidths)


if __name__ == "__main__":
    main()
