"""The engine on one NVIDIA GPU, in one call of a few minutes. Its kernels one by one are bench.kernels'.

    python -m bench.gpu [--rounds 5] [--steps 32] [--results FILE]
    python -m bench.gpu --dry-run        the same on the CPU with tiny models: that it runs to its end

Weights are drawn on the device, in the shapes of Llama 3.2 1B and Llama 3.1 8B and of a part of Qwen3-30B-A3B, in
bfloat16; no file is read. A step is timed on the host around Engine.execute, which ends when the drawn tokens are
there; figures are medians.

    bandwidth    a copy within the device, bytes read and written; what decode at batch 1 reads is set against it:
                 every weight once for a token (the embedding alone is not read, unless it is the head too; of experts
                 the chosen ones)
    prefill      2 · weights · tokens of matrix products, and per layer 2 · heads · head_dim · tokens² of causal
                 attention; set against the dense bfloat16 peak of an H100 or H200 SXM, and against the card's own
    KV memory    sized as a worker does, allocated, and the largest step run beside it

What fails is a line that names its error, and the others go on. The last table says which targets were met; the line in
the results file holds it, too. Exit code 1 where a part failed. Without a GPU: one line, exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from bench.device import PEAK_FLOP_PER_S, copy_bandwidth, has_gpu, peak_of, product_rate
from bench.gpu_models import DRY, Sizes, make_engine, prefill_flop, weight_bytes_read
from bench.gpu_report import Report
from bench.gpu_steps import decode_step_s, prefill_s
from bench.record import append_line, cpu_name
from engine.engine import Engine
from engine.profiling import run_largest_step
from service.config import EngineConfig
from worker.device_memory import blocks_to_measure, free_and_total, measure
from worker.kv_sizing import RankRoom, choose_num_blocks, said

OF_COPY = "the copy's bandwidth"


@dataclasses.dataclass(slots=True)
class Run:
    """Each method is a part, which may fail alone; `copy_bytes_per_s` is None where its part has failed."""

    report: Report
    device: torch.device
    sizes: Sizes
    rounds: int
    steps: int
    card: str
    copy_bytes_per_s: float | None = None

    def hardware(self) -> None:
        report = self.report
        self.copy_bytes_per_s = copy_bandwidth(self.device, self.sizes.copy_bytes, self.rounds)
        report.add("device copy, read and written", self.copy_bytes_per_s / 1e9, "GB/s")
        rate, size = product_rate(self.device, self.sizes.product_size, self.rounds), self.sizes.product_size
        what = f"{size}³ product of the vendor's library"
        report.add(what, rate / 1e12, "TFLOP/s", rate / PEAK_FLOP_PER_S, "989 TFLOP/s")
        if (peak := peak_of(self.card)) is not None:
            report.add(
                "the card's own peak, dense bfloat16", peak / 1e12, "TFLOP/s", rate / peak, "it, by that product"
            )

    def decode_alone(self, name: str, engine: Engine) -> float:
        """Steps per second at batch 1."""
        step_s = decode_step_s(engine, 1, min(128, self.sizes.context_tokens), self.steps)
        self.report.add(
            f"{name}, decode, batch 1",
            1 / step_s,
            "steps/s",
            self._of_copy(weight_bytes_read(engine.spec) / step_s),
            OF_COPY,
        )
        return 1 / step_s

    def small(self) -> None:
        """Eager and with graphs, and the ratio of the two."""
        self._against_eager("1B", self.sizes.small, "1B decode", "graphs")

    def experts(self) -> None:
        self._against_eager("3B of experts", self.sizes.experts, None, None)

    def _against_eager(
        self, name: str, config: dict[str, object], share_key: str | None, ratio_key: str | None
    ) -> None:
        eager = self.decode_alone(f"{name}, eager", make_engine(config, self.device, 64, 0))
        gc.collect()
        engine = make_engine(config, self.device, 64, 8)
        replayed = self.decode_alone(f"{name}, graphs", engine)
        self.report.add(f"{name}, graphs against eager", replayed / eager, "times")
        share = self._of_copy(weight_bytes_read(engine.spec) * replayed)
        if share_key is not None and share is not None:
            self.report.figures[share_key] = share
        if ratio_key is not None:
            self.report.figures[ratio_key] = replayed / eager

    def large(self) -> None:
        report, sizes = self.report, self.sizes
        blocks_each = -(-(sizes.context_tokens + self.steps + 3) // 16)
        num_blocks = max(max(sizes.batches) * blocks_each, -(-sizes.prefill_tokens // 16))
        engine = make_engine(sizes.large, self.device, num_blocks, max(sizes.batches))

        def alone() -> None:
            share = self._of_copy(weight_bytes_read(engine.spec) * self.decode_alone("8B, graphs", engine))
            if share is not None:
                report.figures["8B decode"] = share

        report.attempt("8B, decode, batch 1", alone)
        report.attempt("8B, prefill", lambda: self._prefill(engine))
        rates: list[float] = []
        for batch in sizes.batches:
            report.attempt(f"8B, decode, batch {batch}", lambda batch=batch: rates.append(self._batch(engine, batch)))  # type: ignore[misc]
        if rates:
            report.add("8B, saturation, the best of these", max(rates), "tokens/s")

    def _prefill(self, engine: Engine) -> None:
        num_tokens = self.sizes.prefill_tokens
        rate = prefill_flop(engine.spec, num_tokens) / prefill_s(engine, num_tokens, self.rounds)
        share = rate / PEAK_FLOP_PER_S
        self.report.add(f"8B, prefill of {num_tokens}", rate / 1e12, "TFLOP/s", share, "989 TFLOP/s")
        if (peak := peak_of(self.card)) is not None and peak != PEAK_FLOP_PER_S:
            own = f"{peak / 1e12:.0f} TFLOP/s, the card's own"
            self.report.add(f"8B, prefill of {num_tokens}", rate / 1e12, "TFLOP/s", rate / peak, own)
        self.report.figures["prefill"] = share

    def _batch(self, engine: Engine, batch: int) -> float:
        """Tokens per second."""
        context_tokens = self.sizes.context_tokens
        step_s = decode_step_s(engine, batch, context_tokens, self.steps)
        read = weight_bytes_read(engine.spec) + batch * context_tokens * engine.kv.layout.token_bytes
        what = f"8B, graphs, decode, batch {batch}, context {context_tokens}"
        self.report.add(what, batch / step_s, "tokens/s", self._of_copy(read / step_s), OF_COPY)
        return batch / step_s

    def kv_memory(self) -> None:
        """Raises where what was sized does not fit after all."""
        config = EngineConfig()
        engine = make_engine(
            self.sizes.small, self.device, blocks_to_measure(config, self.device), config.max_sequences
        )
        rooms = [RankRoom("this host", measure(engine, config), engine.kv.layout)]
        num_blocks = choose_num_blocks(None, rooms, config.gpu_memory_share, 1)
        print(f"KV memory: {said(None, rooms, config.gpu_memory_share, num_blocks, 1)}", file=sys.stderr)
        engine.place_kv(num_blocks)
        engine.warm_up()
        run_largest_step(engine, config.max_step_tokens, config.max_sequences)
        free, total = free_and_total(self.device)
        size = num_blocks * engine.kv.layout.block_bytes
        self.report.add("1B, KV memory that a worker takes", size / 2**30, "GiB", size / total, "the device's memory")
        self.report.add("1B, left free beside it", free / 2**30, "GiB", free / total, "the device's memory")

    def _of_copy(self, bytes_per_s: float) -> float | None:
        return None if self.copy_bytes_per_s is None else bytes_per_s / self.copy_bytes_per_s


def run_all(run: Run) -> None:
    parts: dict[str, Callable[[], None]] = {
        "device": run.hardware,
        "1B": run.small,
        "experts": run.experts,
        "8B": run.large,
        "KV memory": run.kv_memory,
    }
    for name, part in parts.items():
        run.report.attempt(name, part)
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each figure but decode's (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=32, help="of decode that are timed (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/gpu.jsonl"), help="gets one JSON line more")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny models; its figures mean nothing")
    options = parser.parse_args()
    if not options.dry_run and not has_gpu("bench.gpu"):
        return 2
    device = torch.device("cpu" if options.dry_run else "cuda")
    card = cpu_name() if options.dry_run else torch.cuda.get_device_properties(device).name
    about = {"name": card, "memory_bytes": free_and_total(device)[1], "cuda": torch.version.cuda}
    title = f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(title, file=sys.stderr, flush=True)
    report = Report()
    run_all(Run(report, device, DRY if options.dry_run else Sizes(), options.rounds, options.steps, card))
    report.print(title)
    lines = [dataclasses.asdict(line) for line in report.lines]
    append_line(options.results, "gpu", options, lines, device=about, targets=report.verdicts())
    return 1 if any(line.error for line in report.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
