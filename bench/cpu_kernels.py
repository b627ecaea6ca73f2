"""The C++ kernels of kernels/cpu against torch on the same tensors, in turns, and the share of the memory's bandwidth.

    python -m bench.cpu_kernels [--threads 2] [--rounds 15] [--only linear|quantised|attention] [--json FILE]

Products with quantised weights stand against our own with the same weight in bf16. A weight is one of several copies
that do not fit in the caches together, taken in turn, as a decoder meets its layers. Times are medians of the rounds;
`best` is the ratio of the shortest ones, which a busy neighbour disturbs least.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.record import append_line
from kernels.cpu.library import Library, shared_library
from kernels.quantised import QuantisedWeight, quantise

SHAPES = {  # name: (outputs, inputs)
    "SmolLM2 qkv": (960, 576),
    "SmolLM2 attention output": (576, 576),
    "SmolLM2 gate and up": (3072, 576),
    "SmolLM2 down": (576, 1536),
    "SmolLM2 head": (49152, 576),
    "Llama-like up": (8192, 2048),
    "Llama-like down": (2048, 8192),
}
QUANTISED_SHAPES = {
    "SmolLM2 down": (576, 1536),
    "SmolLM2 head": (49152, 576),
    "Llama-like": (4096, 14336),
}
FORMS: dict[str, Callable[[Tensor], QuantisedWeight]] = {
    "int8 per output": lambda weight: quantise(weight, "int8"),
    "int8 per 32": lambda weight: quantise(weight, "int8", 32),
    "int4 per 32": lambda weight: quantise(weight, "int4", 32),
    "int4 per 128": lambda weight: quantise(weight, "int4", 128),
    "fp8 per 128": lambda weight: quantise(weight, "fp8", 128),
    "mxfp4": lambda weight: _fp4(weight, 32, torch.float8_e8m0fnu),
    "nvfp4": lambda weight: _fp4(weight, 16, torch.float8_e4m3fn),
}
ROWS = (1, 8, 64, 1024)
CACHE_BYTES = 96 << 20
BANDWIDTH_BYTES = 256 << 20
SEED = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    operation: str
    rows: int
    baseline_us: float
    ours_us: float
    ratio: float
    best_ratio: float
    read_gb_per_s: float  # of the weight, or of keys and values
    bandwidth_share: float  # of what was read in the same run
    gflop_per_s: float


def in_turns(
    one: Callable[[int], object], other: Callable[[int], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of each call; round i gives i to both."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-2, rounds):  # two to warm up
        for taken, call in zip(times, (one, other), strict=True):
            begin = time.perf_counter()
            call(turn)
            if turn >= 0:
                taken.append(time.perf_counter() - begin)
    return times


def row(
    operation: str, rows: int, times: tuple[list[float], list[float]], num_bytes: int, flop: int, peak: float
) -> Row:
    theirs, ours = (statistics.median(taken) for taken in times)
    best = min(times[0]) / min(times[1])
    read = num_bytes / ours / 1e9
    return Row(operation, rows, theirs * 1e6, ours * 1e6, theirs / ours, best, read, read / peak, flop / ours / 1e9)


def read_bandwidth(library: Library, rounds: int) -> float:
    """GB/s, the best of the rounds."""
    memory = torch.ones(BANDWIDTH_BYTES, dtype=torch.uint8)
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        library.read_bytes(memory)
        seconds.append(time.perf_counter() - begin)
    return BANDWIDTH_BYTES / min(seconds) / 1e9


def linears(library: Library, rounds: int, peak: float) -> list[Row]:
    return [line for name, shape in SHAPES.items() for line in linear(library, name, *shape, rounds, peak)]


def linear(library: Library, name: str, outputs: int, inputs: int, rounds: int, peak: float) -> Iterator[Row]:
    num_bytes = outputs * inputs * 2
    copies = max(CACHE_BYTES // num_bytes, 1)
    weights = [(torch.randn(outputs, inputs) * 0.05).bfloat16() for _ in range(copies)]
    panels = [library.pack(weight) for weight in weights]
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        times = in_turns(
            lambda i, x=x: F.linear(x, weights[i % copies]),
            lambda i, x=x: library.linear(x, panels[i % copies], None, outputs),
            rounds if rows > 8 else 4 * rounds,
        )
        yield row(name, rows, times, num_bytes, 2 * rows * outputs * inputs, peak)


def _fp4(weight: Tensor, group: int, dtype: torch.dtype) -> QuantisedWeight:
    """Any codes: no product depends on which they are."""
    outputs, inputs = weight.shape
    codes, scales = torch.randint(256, (outputs, inputs // 2), dtype=torch.uint8), torch.ones(outputs, inputs // group)
    return QuantisedWeight("fp4", codes, scales.to(dtype), inputs, group)


def quantised(library: Library, name: str, outputs: int, inputs: int, rounds: int, peak: float) -> Iterator[Row]:
    weight = torch.randn(outputs, inputs) * 0.05
    wide = copies_of(library.pack(weight.bfloat16()))
    for form, make in FORMS.items():
        narrow = copies_of(library.pack_quantised(make(weight)))
        for rows in ROWS:
            x = torch.randn(rows, inputs).bfloat16()
            times = in_turns(
                lambda i, x=x: library.linear(x, wide[i % len(wide)], None, outputs),
                lambda i, x=x, narrow=narrow: library.linear(x, narrow[i % len(narrow)], None, outputs),
                rounds if rows < 1024 else max(rounds // 5, 3),
            )
            yield row(f"{name}, {form}", rows, times, narrow[0].nbytes, 2 * rows * outputs * inputs, peak)


def copies_of(panels: Tensor) -> list[Tensor]:
    return [panels, *(panels.clone() for _ in range(CACHE_BYTES // panels.nbytes))]


def attention(library: Library, sequences: int, start: int, queries: int, rounds: int, peak: float) -> Row:
    """SmolLM2's heads. torch's side is scaled_dot_product_attention on keys that already lie gathered and repeated."""
    context = start + queries
    memory = torch.randn(sequences * 64, 2, 3, 16, 64).bfloat16()
    tables = torch.arange(sequences * 64, dtype=torch.int32).view(sequences, 64)
    starts = torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32)
    lengths = torch.full((sequences,), context, dtype=torch.int32)
    q = torch.randn(sequences * queries, 9, 64).bfloat16()
    heads = q.view(sequences, queries, 9, 64).transpose(1, 2)
    keys, values = torch.randn(2, sequences, 9, context, 64).bfloat16()
    times = in_turns(
        lambda _: F.scaled_dot_product_attention(heads, keys, values, is_causal=queries > 1),
        lambda _: library.paged_attention(q, memory[:, 0], memory[:, 1], tables, starts, lengths, 0.125),
        rounds,
    )
    pairs = sequences * sum(start + i + 1 for i in range(queries))
    num_bytes = sequences * context * 3 * 64 * 2 * 2
    return row(f"attention up to {context}", len(q), times, num_bytes, pairs * 9 * 64 * 4, peak)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=("linear", "quantised", "attention"))
    parser.add_argument("--json", type=Path, help="append one line")
    options = parser.parse_args()
    library = shared_library()
    if library is None:
        return 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    peak = read_bandwidth(library, options.rounds)
    rows = []
    if options.only in (None, "linear"):
        rows += linears(library, options.rounds, peak)
    if options.only in (None, "quantised"):
        for name, shape in QUANTISED_SHAPES.items():
            rows += quantised(library, name, *shape, options.rounds, peak)
    if options.only in (None, "attention"):
        for sequences, start, queries in ((1, 0, 1024), (1, 959, 64), (1, 1023, 1), (8, 1023, 1)):
            rows.append(attention(library, sequences, start, queries, options.rounds, peak))
    print(f"{options.threads} threads, bf16; memory is read at {peak:.1f} GB/s")
    heads = ("rows", "base us", "ours us", "ratio", "best", "GB/s", "share", "GFLOP/s")
    print(f"{'operation':28}" + "".join(f"{head:>9}" for head in heads))
    for line in rows:
        print(
            f"{line.operation:28}{line.rows:>9}{line.baseline_us:>9.0f}{line.ours_us:>9.0f}{line.ratio:>9.2f}"
            f"{line.best_ratio:>9.2f}{line.read_gb_per_s:>9.1f}{line.bandwidth_share:>9.2f}{line.gflop_per_s:>9.0f}"
        )
    if options.json:
        results = [dataclasses.asdict(line) for line in rows]
        append_line(options.json, "cpu_kernels", options, results, seed=SEED, read_gb_per_s=peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())
