"""The engine on one NVIDIA GPU, in one call of a few minutes: kernels against their references, then speed.

    python -m bench.gpu [--rounds 5] [--steps 32] [--results FILE]

Weights are drawn on the device, in the shapes of Llama 3.2 1B and Llama 3.1 8B, bfloat16; no file is read. A step is
timed on the host around Engine.execute, which ends when the drawn tokens are there; figures are medians.

    bandwidth    a copy within the device, bytes read and written; what decode at batch 1 reads is set against it:
                 every weight once for a token (the embedding alone is not read, unless it is the head too)
    prefill      2 · weights · tokens of matrix products, and per layer 2 · heads · head_dim · tokens² of causal
                 attention; set against the dense bfloat16 peak of an H100 or H200 SXM
    hand-over    the KV of a prompt gathered from scattered blocks of one tensor into a contiguous one, on the device

What fails is a line that names its error, and the others go on. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.record import append_line
from engine.engine import Engine, EngineOptions
from engine.families import tensor_shapes
from engine.model_base import ModelFiles
from kernels import gated_activation, moe_mlp, moe_route, paged_attention, rms_norm, rope_kv_write
from scheduler.plan import Draw, Slice, StepPlan
from spec.hf_config import model_from_hf
from spec.model import ModelSpec
from spec.sampling import SamplingParams

PEAK_FLOP_PER_S = 989e12  # H100 and H200 SXM, dense bfloat16, by the vendor's data sheet
COPY_BYTES = 4 << 30
CONTEXT_TOKENS = 1024
PREFILL_TOKENS = 8192
BATCHES = (64, 128, 256)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA_1B = LLAMA | {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "head_dim": 64,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
}


class DrawnWeights(ModelFiles):
    """Normally distributed weights that keep activations finite, norms of one; made when asked for, on `device`."""

    def __init__(self, spec: ModelSpec, device: torch.device, seed: int = 0) -> None:
        self.path, self.spec = Path("drawn"), spec
        self._shapes, self._device = tensor_shapes(spec), device
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def file_of(self, name: str) -> Path:
        return self.path

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape, dtype = self._shapes[name], dtype or torch.bfloat16
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=self._device)
        scale = shape[-1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=self._device).normal_(0, scale, generator=self._generator)

    @property
    def revision(self) -> str:  # type: ignore[override]
        return "0" * 32


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    what: str
    value: float | None
    unit: str
    share: float | None = None
    of: str = ""
    error: str = ""


class Report:
    """Lines in the order in which they came; a part that fails leaves one too."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(self, what: str, value: float, unit: str, share: float | None = None, of: str = "") -> None:
        self.lines.append(Line(what, value, unit, share, of))
        print(f"{what}: {value:.4g} {unit}", file=sys.stderr, flush=True)

    def attempt(self, what: str, part: Callable[[], None]) -> None:
        try:
            part()
        except Exception as error:
            self.lines.append(
                Line(what, None, "", error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
            )
            print(f"{what} failed: {self.lines[-1].error}", file=sys.stderr, flush=True)

    def print(self, title: str) -> None:
        table = Table("", "value", "", "share", "of", title=title)
        for line in self.lines:
            value = f"[bold]{line.error}[/bold]" if line.value is None else f"{line.value:.4g}"
            table.add_row(line.what, value, line.unit, "" if line.share is None else f"{line.share:.1%}", line.of)
        Console().print(table)


# ---- kernels against their references --------------------------------------------------------------------------------


def check_kernels(report: Report, device: torch.device) -> None:
    """Greatest difference from the reference, relative to the greatest number of it. bfloat16 rounds at 0.4 %."""
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    def compare(name: str, run: Callable[[Any], tuple[Tensor, ...]], kernel: Any, reference: Any) -> None:
        def part() -> None:
            worst = 0.0
            for found, expected in zip(run(kernel), run(reference), strict=True):
                scale = expected.float().abs().max().clamp(min=1e-30)
                worst = max(worst, float((found.float() - expected.float()).abs().max() / scale))
            report.add(f"kernel {name}, greatest difference", worst, "", worst / 0.02, "0.02")
            if not worst <= 0.02:
                raise ArithmeticError(f"{name} is {worst:.3g} off its reference")

        report.attempt(f"kernel {name}", part)

    x, weight, residual = drawn(123, 4096), drawn(4096), drawn(123, 4096)
    compare("rms_norm", lambda f: f(x, weight, 1e-5, residual), rms_norm.rms_norm, rms_norm.reference)
    gate_up = drawn(123, 2 * 14336)
    compare(
        "gated_activation",
        lambda f: (f(gate_up, "silu"),),
        gated_activation.gated_activation,
        gated_activation.reference,
    )

    lengths, counts, block_tokens = (1023, 17, 300, 2048), (1, 1, 100, 513), 16
    width = -(-max(lengths) // block_tokens)
    num_blocks = len(lengths) * width
    blocks = drawn(num_blocks, 2, 8, block_tokens, 128)
    tables = torch.randperm(num_blocks, device=device).int().view(len(lengths), width)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=device)

    def attend(chosen: list[int]) -> Callable[[Any], tuple[Tensor, ...]]:
        starts = torch.tensor(
            [0, *(sum(counts[s] for s in chosen[: i + 1]) for i in range(len(chosen)))], device=device
        )
        queries = drawn(int(starts[-1]), 32, 128)
        return lambda f: (
            f(queries, blocks[:, 0], blocks[:, 1], tables[chosen], starts.int(), contexts[chosen], 128**-0.5),
        )

    attention = paged_attention.paged_attention
    compare("paged_attention, decodes", attend([0, 1]), attention, paged_attention.reference)
    compare("paged_attention, mixed", attend([0, 1, 2, 3]), attention, paged_attention.reference)

    qkv, cos, sin = drawn(37, 48 * 128), torch.rand(64, 64, device=device), torch.rand(64, 64, device=device)
    positions, slots = torch.arange(37, device=device), torch.randperm(num_blocks * block_tokens, device=device)[:37]

    def turn(f: Any) -> tuple[Tensor, ...]:
        written = torch.zeros_like(blocks)
        queries = f(qkv, cos, sin, positions, slots, written[:, 0], written[:, 1], 32)
        return queries.flatten(1), written

    compare("rope_kv_write", turn, rope_kv_write.rope_kv_write, rope_kv_write.reference)

    experts = moe_mlp.pack_experts(drawn(8, 2 * 512, 1024) / 32, drawn(8, 1024, 512) / 32)
    rows, logits = drawn(61, 1024), torch.randn(61, 8, device=device)
    options: dict[str, Any] = {"experts_per_token": 2, "scoring": "softmax", "normalise": True}
    compare(
        "moe_route",
        lambda f: tuple(each.float() for each in f(logits, **options)),
        moe_route.moe_route,
        lambda *inputs, **named: moe_route.reference(*inputs, **named),
    )
    ids, shares = moe_route.reference(logits, **options)
    compare("moe_mlp", lambda f: (f(rows, experts, ids, shares, "silu"),), moe_mlp.moe_mlp, moe_mlp.reference)


# ---- speed -----------------------------------------------------------------------------------------------------------


def seconds_on_device(run: Callable[[], object], rounds: int) -> float:
    """Median of `rounds`, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after) / 1e3)
    return statistics.median(times[1:])


def copy_bandwidth(device: torch.device, rounds: int) -> float:
    """Bytes per second, read and written."""
    source = torch.ones(COPY_BYTES // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_on_device(lambda: target.copy_(source), rounds)


def product_rate(device: torch.device, rounds: int) -> float:
    """FLOP per second of a square bfloat16 product by the vendor's library."""
    size = 8192
    x = torch.randn(size, size, device=device).bfloat16()
    out = torch.empty_like(x)
    return 2 * size**3 / seconds_on_device(lambda: torch.mm(x, x, out=out), rounds)


def weight_bytes_read(spec: ModelSpec) -> int:
    """By a decode step, in bfloat16."""
    embedding = 0 if spec.tie_embeddings else spec.vocab_size * spec.hidden_size
    return 2 * (spec.num_parameters - embedding)


def prefill_flop(spec: ModelSpec, num_tokens: int) -> float:
    """Of a prompt whose last token alone goes through the head."""
    head = spec.vocab_size * spec.hidden_size
    in_layers = weight_bytes_read(spec) // 2 - head
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * num_tokens**2
    return 2.0 * (in_layers * num_tokens + head) + attention


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
    seconds = seconds_on_device(lambda: torch.index_select(memory, 0, index, out=landing), rounds)
    return len(index) * layout.block_bytes / seconds


def make_engine(config: dict[str, Any], device: torch.device, num_blocks: int, graph_rows: int) -> Engine:
    options = EngineOptions(dtype="bfloat16", device=device.type, graph_rows=graph_rows)
    engine = Engine(DrawnWeights(model_from_hf(config), device), options, num_blocks)
    engine.kv.tensor.normal_()
    engine.warm_up()
    return engine


def measure(report: Report, device: torch.device, options: argparse.Namespace) -> None:
    found: dict[str, float] = {}

    def hardware() -> None:
        found["copy"] = copy_bandwidth(device, options.rounds)
        report.add("device copy, read and written", found["copy"] / 1e9, "GB/s")
        rate = product_rate(device, options.rounds)
        report.add(
            "8192³ product of the vendor's library", rate / 1e12, "TFLOP/s", rate / PEAK_FLOP_PER_S, "989 TFLOP/s"
        )

    def decode_alone(name: str, engine: Engine) -> None:
        step_s = decode_step_s(engine, 1, 128, options.steps)
        read = weight_bytes_read(engine.spec) / step_s
        share = read / found["copy"] if "copy" in found else None
        report.add(f"{name}, decode, batch 1", 1 / step_s, "steps/s", share, "the copy's bandwidth")

    def small(graph_rows: int) -> None:
        name = f"1B, {'graphs' if graph_rows else 'eager'}"
        decode_alone(name, make_engine(LLAMA_1B, device, 1024, graph_rows))

    def large() -> None:
        blocks_each = -(-(CONTEXT_TOKENS + options.steps + 3) // 16)
        engine = make_engine(LLAMA_8B, device, max(BATCHES) * blocks_each, max(BATCHES))
        report.attempt("8B, decode, batch 1", lambda: decode_alone("8B, graphs", engine))

        def prefill() -> None:
            seconds = prefill_s(engine, PREFILL_TOKENS, options.rounds)
            rate = prefill_flop(engine.spec, PREFILL_TOKENS) / seconds
            share = rate / PEAK_FLOP_PER_S
            report.add(f"8B, prefill of {PREFILL_TOKENS}", rate / 1e12, "TFLOP/s", share, "989 TFLOP/s")

        def saturation(batch: int) -> None:
            step_s = decode_step_s(engine, batch, CONTEXT_TOKENS, options.steps)
            kv = batch * CONTEXT_TOKENS * engine.kv.layout.token_bytes
            share = (weight_bytes_read(engine.spec) + kv) / step_s / found["copy"] if "copy" in found else None
            what = f"8B, graphs, decode, batch {batch}, context {CONTEXT_TOKENS}"
            report.add(what, batch / step_s, "tokens/s", share, "the copy's bandwidth")

        def hand_over() -> None:
            rate = hand_over_bandwidth(engine, PREFILL_TOKENS, options.rounds)
            share = 2 * rate / found["copy"] if "copy" in found else None
            report.add(f"8B, KV of {PREFILL_TOKENS} gathered", rate / 1e9, "GB/s of KV", share, "the copy's bandwidth")

        report.attempt("8B, prefill", prefill)
        for batch in BATCHES:
            report.attempt(f"8B, decode, batch {batch}", lambda batch=batch: saturation(batch))  # type: ignore[misc]
        report.attempt("8B, hand-over", hand_over)

    parts: dict[str, Callable[[], None]] = {
        "device": hardware,
        "1B, eager": lambda: small(0),
        "1B, graphs": lambda: small(8),
        "8B": large,
    }
    for name, part in parts.items():
        report.attempt(name, part)
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each figure but decode's (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="of decode that are timed (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/gpu.jsonl"), help="gets one JSON line more")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"bench.gpu needs an NVIDIA GPU and a torch built for it; torch {torch.__version__} sees none",
            file=sys.stderr,
        )
        return 2
    device, report = torch.device("cuda"), Report()
    properties = torch.cuda.get_device_properties(device)
    about = {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    title = f"{properties.name}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(title, file=sys.stderr, flush=True)
    report.attempt("kernels", lambda: check_kernels(report, device))
    measure(report, device, options)
    report.print(title)
    append_line(options.results, "gpu", options, [dataclasses.asdict(line) for line in report.lines], device=about)
    return 1 if any(line.error for line in report.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
