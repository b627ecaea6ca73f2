"""The tuner: which tiles, warps and stages of an operation are fastest on this GPU, for every row of its table.

    python -m kernels.tune OPERATION [--shapes NAME ...] [--write]   time the search space; write tuned/*.toml
    python -m kernels.tune OPERATION --compile-only                  what of the space no chip can do, without a GPU
    python -m kernels.tune --report                                  registers, spills, shared memory of every shape

A row keeps its range of shapes. What is fastest over the shapes of kernels/tuned_shapes.py that take the row, by the
geometric mean of median times, takes its place where it is at least 2 % faster. Nothing is timed that spills, does not
fit, or is off the reference.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import itertools
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from kernels import tuning
from kernels.tuned_shapes import SHAPES
from kernels.tuning import SHARED_BYTES, Config, Table

_TILES: dict[str, dict[str, tuple[int, ...]]] = {
    "fp8_linear": {"rows": (16, 32, 64, 128), "outputs": (32, 64, 128, 256)},
    "fp8_quantise": {"blocks": (4, 8, 16, 32)},
    "gated_activation": {"columns": (512, 1024, 2048, 4096)},
    "grouped_fp8_linear": {"rows": (16, 32, 64, 128), "outputs": (32, 64, 128, 256)},
    "grouped_linear": {"rows": (16, 32, 64, 128), "outputs": (32, 64, 128, 256), "depth": (32, 64, 128)},
    "grouped_quantised_linear": {"rows": (16, 32, 64, 128), "outputs": (32, 64, 128), "depth": (32, 64, 128, 256)},
    "kv_pack": {"elements": (512, 1024, 2048, 4096)},
    "moe_combine": {"columns": (512, 1024, 2048, 4096)},
    "paged_attention": {"rows": (16, 32, 64, 128), "kv_tokens": (16, 32, 64, 128)},
    "quantised_linear": {"rows": (16, 32, 64), "outputs": (32, 64, 128), "depth": (32, 64, 128, 256)},
    "rms_norm": {"elements": (512, 1024, 2048, 4096)},
    "rope_kv_write": {"elements": (1024, 2048, 4096)},
    "sampling": {"tokens": (1024, 2048, 4096, 8192)},
}
_LOOPS = {  # whose loops are pipelined in stages
    *("fp8_linear", "grouped_fp8_linear", "grouped_linear", "grouped_quantised_linear"),
    *("paged_attention", "quantised_linear"),
}
TOLERANCE = 0.02  # of the norm of the reference; bfloat16 rounds at 0.4 %
LEAST_GAIN = 0.02
FLUSH_BYTES = 256 << 20  # more than a cache of the GPUs we name


def space(operation: str) -> list[Config]:
    tiles = _TILES.get(operation, {})
    warps, stages = ((4, 8), (2, 3, 4)) if operation in _LOOPS else ((1, 2, 4, 8, 16), (3,))
    return [
        Config(dict(zip(tiles, values, strict=True)), num_warps, num_stages)
        for *values, num_warps, num_stages in itertools.product(*tiles.values(), warps, stages)
    ]


def shapes_of(table: Table, architecture: int, names: Iterable[str] = ()) -> dict[int, list[str]]:
    """Row -> the shapes of its operation that take it, of those named, or of all."""
    from kernels.compilation import record

    found: dict[int, list[str]] = {}
    for shape, entry in SHAPES.items():
        if entry.operation == table.operation and (not names or shape in names):
            (row,) = (row for operation, row in record(shape, architecture).rows if operation == table.operation)
            found.setdefault(row, []).append(shape)
    return found


def faults(configs: list[Config], shapes: list[str], architecture: int, pool: Any) -> list[str | None]:
    """Of each, why one of the shapes may not be launched so."""
    from kernels.compilation import fault_of

    found: list[str | None] = [None] * len(configs)
    for shape in shapes:
        open_ = [index for index, fault in enumerate(found) if fault is None]
        arguments = [shape] * len(open_), [architecture] * len(open_), [configs[index] for index in open_]
        for index, fault in zip(open_, pool.map(fault_of, *arguments), strict=True):
            found[index] = fault
    return found


def is_right(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    return all(
        bool((one.double() - other.double()).norm() <= TOLERANCE * other.double().norm())
        for one, other in zip(found, expected, strict=True)
    )


def median_us(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Of each: run in turn, so that what slows the GPU slows all, each with a cold L2 cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for own, run in zip(times, runs, strict=True):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            run()
            end.record()
            end.synchronize()
            own.append(start.elapsed_time(end) * 1e3)
    return [statistics.median(own) for own in times]


def timed(shape: str, configs: list[Config], rounds: int) -> list[float]:
    """Median microseconds of each config; infinite where it fails or its result is off the reference."""
    operation, device = SHAPES[shape].operation, torch.device("cuda")
    torch.manual_seed(0)
    call = SHAPES[shape].make(device)
    architecture = tuning.architecture_on(torch.device("cuda", torch.cuda.current_device()))
    expected = call.expected()

    def using(config: Config, run: Callable[[], Any]) -> Any:
        def choose(asked: str, numbers: tuning.Shape) -> Config:
            table = tuning.table(asked, architecture)
            return config if asked == operation else table.rows[table.index(numbers)].config

        with tuning.choosing(choose):
            return run()

    right = [index for index, config in enumerate(configs) if is_right(using(config, call.results), expected)]
    runs = [functools.partial(using, configs[index], call.launch) for index in right]
    found = dict(zip(right, median_us(runs, rounds), strict=True))
    return [found.get(index, math.inf) for index in range(len(configs))]


def tuned(table: Table, architecture: int, names: list[str], rounds: int, pool: Any) -> Iterator[tuple[int, Config]]:
    """Rows, each with what is to be launched in it; one line is printed for each."""
    for index, shapes in sorted(shapes_of(table, architecture, names).items()):
        own = table.rows[index].config
        others = [config for config in space(table.operation) if config != own]
        fit = [c for c, fault in zip(others, faults(others, shapes, architecture, pool), strict=True) if fault is None]
        configs = [own, *fit]
        logs = [0.0] * len(configs)
        for shape in shapes:
            times = timed(shape, configs, rounds)
            logs = [log + math.log(time / times[0]) for log, time in zip(logs, times, strict=True)]
        best = min(range(len(configs)), key=logs.__getitem__)
        gain = 1 - math.exp(logs[best] / len(shapes))
        chosen = configs[best] if gain >= LEAST_GAIN else own
        print(
            f"row {index}, {len(shapes)} shapes, {len(configs)} configurations: {gain:.1%} faster with {configs[best]}"
        )
        yield index, chosen


def compile_only(operation: str, names: list[str], pool: Any) -> None:
    """The search space against one shape of each row, on every architecture."""
    for architecture in SHARED_BYTES:
        table, configs = tuning.table(operation, architecture), space(operation)
        for index, shapes in sorted(shapes_of(table, architecture, names).items()):
            found = faults(configs, shapes[:1], architecture, pool)
            for config, fault in zip(configs, found, strict=True):
                if fault is not None:
                    print(f"sm_{architecture}  row {index:2}  dropped: {config}: {fault}")
            print(f"sm_{architecture}  row {index:2}  {found.count(None)} of {len(configs)} can be timed", flush=True)


def report(pool: Any) -> None:
    from kernels.compilation import compile_shape, line_of

    every = [(shape, architecture) for shape in SHAPES for architecture in SHARED_BYTES]
    for (shape, _), usages in zip(every, pool.map(compile_shape, *zip(*every, strict=True)), strict=True):
        for usage in usages:
            print(line_of(shape, usage), f"  {usage.fault}" if usage.fault else "", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("operation", nargs="?", choices=tuning.operations())
    parser.add_argument("--shapes", nargs="+", default=[], metavar="NAME", help="of kernels/tuned_shapes.py")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    for flag in ("--write", "--compile-only", "--report"):
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    if (options.operation is None) != options.report:
        parser.error("an OPERATION or --report")
    if unknown := [name for name in options.shapes if name not in SHAPES]:
        parser.error(f"no such shape: {', '.join(unknown)}")
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: pip install 'legato[gpu]'", file=sys.stderr)
        return 2
    if not (options.report or options.compile_only or torch.cuda.is_available()):
        print("There is no GPU to time on: --compile-only and --report need none.", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        if options.report:
            report(pool)
        elif options.compile_only:
            compile_only(options.operation, options.shapes, pool)
        else:
            _tune(options, pool)
    return 0


def _tune(options: argparse.Namespace, pool: Any) -> None:
    architecture = tuning.architecture_on(torch.device("cuda", torch.cuda.current_device()))
    table = tuning.table(options.operation, architecture)
    rows = list(table.rows)
    for index, config in tuned(table, architecture, options.shapes, options.rounds, pool):
        rows[index] = dataclasses.replace(rows[index], config=config)
    if options.write:
        measured = f"{torch.cuda.get_device_name()}, {datetime.date.today()}"
        text = tuning.write(Table(table.operation, architecture, measured, tuple(rows)))
        path = tuning.FOLDER / f"{table.operation}.sm_{architecture}.toml"
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
