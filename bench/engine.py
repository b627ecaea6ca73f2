"""The engine alone against transformers: same weights, same dtype, same threads, one process, interleaved A-B-A-B.

Measured with random tokens, greedy: decode at batch 1 and 8 (median time of a step), prefill of one long prompt (time
to its first token), and in the same rounds the memory read bandwidth of the same threads, of which decode at batch 1
can use a share: it reads every weight once for a token. transformers runs its own `generate`.

A run in which transformers' own figures moved by more than 15 % between rounds is marked as not steady, here and in the
JSON line: the machine was not quiet. Needs the dev extra, as `make test` installs it.
"""

from __future__ import annotations

import argparse
import itertools
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from bench.bandwidth import probe_memory, read_bandwidth
from bench.record import append_line
from engine.convert import convert_gguf
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from kernels.cpu.library import shared_library
from scheduler.plan import Draw, Slice, StepPlan
from service.model_source import resolve_model
from spec.sampling import SamplingParams

EXAMPLES = """examples:
  python -m bench.engine                                     SmolLM2 in bfloat16 on two threads, about two minutes
  python -m bench.engine --model ./Llama-3.2-1B --rounds 3   a Hugging Face folder
  python -m bench.engine --dtype float32 --threads 1 --seed 7
"""
STEADY = 0.15


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = as_folder(options.model, Path(temporary))
        ours, theirs = Ours(folder, options), Theirs(folder, options)
        workloads = workloads_of(ours, theirs, options)
        measured = measure(workloads, options.rounds)
    report(measured, ours, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or smollm2 (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2, help="of both sides (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="A-B pairs of each workload (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="decode batches (default: 1 8)")
    parser.add_argument("--context-tokens", type=int, default=128, help="before decode begins (default: %(default)s)")
    parser.add_argument("--decode-steps", type=int, default=48, help="of one measurement (default: %(default)s)")
    parser.add_argument("--prefill-tokens", type=int, default=1024, help="of one prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/engine.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


def as_folder(model: str, temporary: Path) -> Path:
    path = resolve_model(model)
    if path.is_dir():
        return path
    convert_gguf(path, temporary / "model")
    return temporary / "model"


class Ours:
    """`form` are options of the engine beside dtype, device and threads."""

    def __init__(self, folder: Path, options: argparse.Namespace, **form: Any) -> None:
        self.num_tokens = max(options.prefill_tokens, options.context_tokens + options.decode_steps + 2)
        self.blocks_each = -(-self.num_tokens // 16)
        engine_options = EngineOptions(dtype=options.dtype, device="cpu", threads=options.threads, **form)
        self.engine = Engine(open_model(folder), engine_options, self.blocks_each * max(options.batch))
        self.engine.warm_up()

    def prefill(self, prompts: list[list[int]]) -> float:
        started = time.perf_counter()
        self._step([(tuple(prompt), 0) for prompt in prompts])
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], num_steps: int) -> float:
        """Median seconds of a step."""
        drawn = self._step([(tuple(prompt), 0) for prompt in prompts])
        times = []
        for step in range(num_steps):
            started = time.perf_counter()
            drawn = self._step([((token_id,), len(prompts[0]) + step) for token_id in drawn])
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    def _step(self, pieces: list[tuple[tuple[int, ...], int]]) -> list[int]:
        greedy = SamplingParams(temperature=0.0)
        slices = []
        for row, (token_ids, start) in enumerate(pieces):
            table = tuple(range(row * self.blocks_each, (row + 1) * self.blocks_each))
            end = start + len(token_ids)
            slices.append(Slice(str(row), token_ids, start, table, Draw(greedy, end, min(end, 1), ())))
        result = self.engine.execute(StepPlan(0, tuple(slices)))
        return [drawn.token_id for each in result.drawn for drawn in each]


class Clock(StoppingCriteria):
    """transformers calls it after every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Theirs:
    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval()
        self._generate([[1] * 32], 4)

    def prefill(self, prompts: list[list[int]]) -> float:
        started = time.perf_counter()
        return self._generate(prompts, 1)[0] - started

    def decode(self, prompts: list[list[int]], num_steps: int) -> float:
        """Median seconds of a step."""
        times = self._generate(prompts, num_steps + 1)
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], num_tokens: int) -> list[float]:
        clock, token_ids = Clock(), torch.tensor(prompts)
        self.model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return clock.times


Workloads = dict[str, tuple[Callable[[], float], Callable[[], float]]]


def workloads_of(ours: Ours, theirs: Theirs, options: argparse.Namespace) -> Workloads:
    generator = random.Random(options.seed)
    vocab = ours.engine.spec.vocab_size

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[generator.randrange(3, vocab) for _ in range(length)] for _ in range(count)]

    workloads: Workloads = {}
    for batch in options.batch:
        made = prompts(batch, options.context_tokens)
        workloads[f"decode, batch {batch}"] = (
            lambda made=made: ours.decode(made, options.decode_steps),  # type: ignore[misc]
            lambda made=made: theirs.decode(made, options.decode_steps),  # type: ignore[misc]
        )
    long = prompts(1, options.prefill_tokens)
    workloads[f"prefill, {options.prefill_tokens} tokens"] = (lambda: ours.prefill(long), lambda: theirs.prefill(long))
    return workloads


def measure(workloads: Workloads, num_rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round; "bandwidth" has bytes per second. Every workload runs once before anything counts."""
    memory = probe_memory()
    measured: dict[str, dict[str, list[float]]] = {name: {"ours": [], "theirs": []} for name in workloads}
    measured["bandwidth"] = {"read": []}
    for number in range(num_rounds + 1):
        print(f"\rround {number}/{num_rounds}", end="", file=sys.stderr, flush=True)
        for name, (ours, theirs) in workloads.items():
            one, other = ours(), theirs()
            if number:
                measured[name]["ours"].append(one)
                measured[name]["theirs"].append(other)
        measured["bandwidth"]["read"].append(read_bandwidth(memory))
    print(file=sys.stderr)
    return measured


def report(measured: dict[str, dict[str, list[float]]], ours: Ours, options: argparse.Namespace) -> None:
    bandwidth = statistics.median(measured.pop("bandwidth")["read"])
    table = Table("", "ours, ms", "transformers, ms", "ratio", "rounds", title=f"{options.model}, {options.dtype}")
    rows: dict[str, dict[str, Any]] = {}
    for name, times in measured.items():
        one, other = statistics.median(times["ours"]), statistics.median(times["theirs"])
        ratios = [b / a for a, b in zip(times["ours"], times["theirs"], strict=True)]
        ratio = statistics.median(ratios)
        rows[name] = {"ours_ms": one * 1e3, "theirs_ms": other * 1e3, "ratio": ratio, "ratios": ratios, "rounds": times}
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        table.add_row(name, f"{one * 1e3:.2f}", f"{other * 1e3:.2f}", f"{ratio:.2f}", spread)
    engine = ours.engine
    weight_bytes = engine.spec.num_parameters * engine.dtype.itemsize_bytes
    share = weight_bytes / (rows["decode, batch 1"]["ours_ms"] / 1e3) / bandwidth if 1 in options.batch else None
    drift = max(max(t["theirs"]) / min(t["theirs"]) - 1.0 for t in measured.values())
    console = Console()
    console.print(table)
    console.print(f"memory is read at {bandwidth / 1e9:.1f} GB/s by {options.threads} threads")
    if share is not None:
        console.print(f"decode at batch 1 reads {weight_bytes / 1e6:.0f} MB of weights a token: {share:.0%} of that")
    steady = drift <= STEADY
    if not steady:
        console.print(f"[bold]not a quiet machine: transformers moved by {drift:.0%} between rounds[/bold]")
    append_line(
        options.results,
        "engine",
        options,
        rows,
        kernels="torch" if shared_library() is None else "cpu",
        bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=share,
        steady=steady,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


if __name__ == "__main__":
    main()
