"""What quantisation costs and gains: quality on a real text, and speed, of one model in each form.

Forms of other makers' checkpoints (GPTQ, AWQ, FP8, MXFP4, NVFP4) are written from the model and loaded as any folder of
theirs. Their weights are rounded to nearest; makers calibrate them on data, which does better.

Quality: perplexity of the text, and the mean Kullback-Leibler divergence of the next-token distribution from that of
the reference, the same weights in bfloat16, in nats a token. Speed: decode at batch 1 and 8 and prefill, all forms
interleaved A-B-C-A-B-C; the ratio is to the reference in the same round. Bytes are those of all weights in memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.engine import Ours
from bench.quantised_folder import (
    FP8_CHANNELS,
    FP8_TENSOR,
    MODELOPT_NVFP4,
    MXFP4,
    Checkpoint,
    awq,
    block_fp8,
    gptq,
    write_folder,
)
from bench.record import append_line
from engine.convert import convert_gguf
from engine.engine import Engine
from engine.projection import Projection
from engine.step import StepTensors
from kernels.linear import PackedLinear
from kernels.moe_mlp import PackedExperts
from service.model_source import resolve_model
from service.tokenizer import load_tokenizer

EXAMPLES = """examples:
  python -m bench.quantisation                                  SmolLM2 on this repository's README
  python -m bench.quantisation --text book.txt --tokens 4096
  python -m bench.quantisation --model ./Llama-3.2-1B --forms bfloat16 int8 int4
"""


@dataclasses.dataclass(frozen=True)
class Form:
    """options: of the engine. checkpoint: what the model is first written as, by rounding to nearest."""

    options: dict[str, str]
    checkpoint: Checkpoint | None = None


AS_STORED = {"quantisation": "auto"}
ROUNDED = AS_STORED | {"activations": "stored"}
FORMS = {  # the first is the reference
    "bfloat16": Form({"quantisation": "none"}),
    "int8": Form({"quantisation": "int8"}),
    "fp8": Form({"quantisation": "fp8"}),
    "int4": Form({"quantisation": "int4"}),
    "as stored": Form(AS_STORED),
    "GPTQ int8": Form(AS_STORED, gptq(128, bits=8)),
    "GPTQ int4": Form(AS_STORED, gptq(128)),
    "GPTQ desc_act": Form(AS_STORED, gptq(128, in_order=False)),
    "AWQ int4": Form(AS_STORED, awq(64)),  # in groups that SmolLM2's 576 inputs are whole numbers of
    "FP8 tensor": Form(AS_STORED, FP8_TENSOR),
    "FP8 channel": Form(AS_STORED, FP8_CHANNELS),
    "FP8 blocks": Form(AS_STORED, block_fp8(128)),
    "FP8 channel, FP8 rows": Form(ROUNDED, FP8_CHANNELS),
    "FP8 blocks, FP8 rows": Form(ROUNDED, block_fp8(128)),
    "MXFP4": Form(AS_STORED, MXFP4),
    "NVFP4": Form(AS_STORED, MODELOPT_NVFP4),
    "KV int8": Form({"quantisation": "none", "kv_dtype": "int8"}),
    "KV fp8": Form({"quantisation": "none", "kv_dtype": "float8_e4m3"}),
}
WINDOW_TOKENS = 512  # the text is cut into windows that are read alone


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    path = resolve_model(options.model)
    forms = {name: FORMS[name] for name in dict.fromkeys(["bfloat16", *options.forms])}
    windows = read_windows(path, options)
    sides = sides_of(path, forms, options)
    quality = measure_quality(sides, windows)
    speed = measure_speed(sides, options)
    report(sides, quality, speed, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantisation",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or smollm2 (default: %(default)s)")
    parser.add_argument("--text", type=Path, default=Path("README.md"), help="that is read (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text at most (default: %(default)s)")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), help="(default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0: quality alone (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=Path("results/quantisation.jsonl"), help="gets one JSON line more"
    )
    return parser.parse_args()


def read_windows(path: Path, options: argparse.Namespace) -> list[list[int]]:
    token_ids = load_tokenizer(path).encode(options.text.read_text(encoding="utf-8"))[: options.tokens]
    windows = [token_ids[start : start + WINDOW_TOKENS] for start in range(0, len(token_ids), WINDOW_TOKENS)]
    found = [window for window in windows if len(window) > 1]
    if not found:
        sys.exit(f"{options.text} holds no text to read")
    return found


def sides_of(path: Path, forms: dict[str, Form], options: argparse.Namespace) -> dict[str, Ours]:
    """bench.engine's own side, with an engine in each form. A checkpoint is written, loaded and thrown away."""
    sides = {}
    with tempfile.TemporaryDirectory(prefix="legato-quantisation-") as scratch:
        plain = path
        if path.suffix == ".gguf" and any(form.checkpoint is not None for form in forms.values()):
            plain = Path(scratch, "plain")
            convert_gguf(path, plain)
        for number, (name, form) in enumerate(forms.items()):
            print(f"\rloading {number + 1}/{len(forms)}", end="", file=sys.stderr, flush=True)
            folder = path
            if form.checkpoint is not None:
                folder = Path(scratch, str(number))
                write_folder(plain, folder, form.checkpoint)
            sides[name] = side_of(folder, form.options, options)
            if folder != path:
                shutil.rmtree(folder)
    print(file=sys.stderr)
    return sides


def side_of(path: Path, chosen: dict[str, str], options: argparse.Namespace) -> Ours:
    settings = argparse.Namespace(
        prefill_tokens=1024,
        context_tokens=128,
        decode_steps=48,
        batch=[1, 8],
        dtype="bfloat16",
        threads=options.threads,
    )
    return Ours(path, settings, **chosen)


@torch.inference_mode()
def logprobs_of(engine: Engine, window: list[int]) -> torch.Tensor:
    """[len(window) - 1, vocab] float32: of each next token."""
    count = len(window)
    step = StepTensors(
        token_ids=torch.tensor(window),
        positions=torch.arange(count),
        slots=torch.arange(count),
        block_tables=torch.arange(engine.kv.layout.blocks_for(count), dtype=torch.int32)[None],
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([count], dtype=torch.int32),
        wanted_rows=None,
        live=None,
    )
    hidden = engine.decoder.forward(step)
    assert hidden is not None
    return torch.log_softmax(engine.decoder.logits(hidden[:-1]), dim=-1)


def measure_quality(sides: dict[str, Ours], windows: list[list[int]]) -> dict[str, dict[str, float]]:
    losses: dict[str, list[float]] = {name: [] for name in sides}
    divergences: dict[str, list[float]] = {name: [] for name in sides}
    for number, window in enumerate(windows):
        print(f"\rtext {number + 1}/{len(windows)}", end="", file=sys.stderr, flush=True)
        reference: torch.Tensor | None = None
        for name, side in sides.items():
            rows = logprobs_of(side.engine, window)
            reference = rows if reference is None else reference
            losses[name].extend((-rows.gather(1, torch.tensor(window[1:])[:, None])).flatten().tolist())
            divergences[name].extend((reference.exp() * (reference - rows)).sum(1).tolist())
    print(file=sys.stderr)
    return {
        name: {"perplexity": math.exp(statistics.fmean(losses[name])), "kl": statistics.fmean(divergences[name])}
        for name in sides
    }


def measure_speed(sides: dict[str, Ours], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    times: dict[str, dict[str, list[float]]] = {name: {"b1": [], "b8": [], "prefill": []} for name in sides}
    for number in range(options.rounds + 1 if options.rounds else 0):  # the first warms up
        print(f"\rround {number}/{options.rounds}", end="", file=sys.stderr, flush=True)
        for name, side in sides.items():
            vocab = side.engine.spec.vocab_size
            prompts = [[(7 * i + 13 * j) % vocab for j in range(128)] for i in range(8)]
            long = [[(31 * j + 5) % vocab for j in range(1024)]]
            taken = side.decode(prompts[:1], 48), side.decode(prompts, 48), side.prefill(long)
            if number:
                for key, value in zip(("b1", "b8", "prefill"), taken, strict=True):
                    times[name][key].append(value)
    print(file=sys.stderr)
    return times


def weight_bytes(value: Any) -> int:
    """Of all tensors, each memory once."""
    seen: dict[int, int] = {}

    def walk(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            seen[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, (Projection, PackedLinear, PackedExperts)) or dataclasses.is_dataclass(item):
            for field in dataclasses.fields(item):
                walk(getattr(item, field.name))
        elif isinstance(item, dict):
            walk(tuple(item.values()))
        elif isinstance(item, tuple):
            for each in item:
                walk(each)

    walk(value)
    return sum(seen.values())


def report(
    sides: dict[str, Ours],
    quality: dict[str, dict[str, float]],
    speed: dict[str, dict[str, list[float]]],
    options: argparse.Namespace,
) -> None:
    table = Table("", "weights, MB", "KV, bytes a token", "perplexity", "KL, nats", "decode b1", "b8", "prefill")
    reference, rows = speed["bfloat16"], {}
    for name, side in sides.items():
        ratios = {
            key: statistics.median(a / b for a, b in zip(reference[key], values, strict=True))
            for key, values in speed[name].items()
            if values
        }
        held = weight_bytes(side.engine.decoder.weights)
        kv = side.engine.kv.layout.token_bytes
        rows[name] = {
            "weight_bytes": held,
            "kv_token_bytes": kv,
            **quality[name],
            "ratios": ratios,
            "times": speed[name],
        }
        table.add_row(
            name,
            f"{held / 1e6:.0f}",
            str(kv),
            f"{quality[name]['perplexity']:.2f}",
            f"{quality[name]['kl']:.4f}",
            *(f"{ratios[key]:.2f}×" if ratios else "" for key in ("b1", "b8", "prefill")),
        )
    Console().print(table)
    append_line(options.results, "quantisation", options, rows)


if __name__ == "__main__":
    main()
