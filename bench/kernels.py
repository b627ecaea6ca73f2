"""Each Triton kernel on one NVIDIA GPU, in one call of under ten minutes: right first, then how near the limit.

    python -m bench.kernels [--rounds 25] [--only NAME] [--limit-s 540] [--results FILE]
    python -m bench.kernels --dry-run        the same in the Triton interpreter with tiny shapes

A kernel is compared with its reference at shapes that are odd, and so are its peers: PyTorch's best, and FlashInfer
where it is installed. Then all of them take turns at full size, each as a CUDA graph where it can be captured, with
caches emptied before each turn. The limits are measured in the same run: a copy within the device (bytes read and
written), a large product in bfloat16 and one in fp8. A rate counts the bytes or the arithmetic that the task takes at
the least, whatever a kernel does beyond. `× peer` is how many times as fast as the peer the kernel is.

To add a kernel is to add a Case to the CASES of a bench/kernel_*.py. What cannot run is a line that says why, and the
others go on. Exit code 0 if all kernels ran, met goals or not; 1 if one is wrong or could not run; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bench.device import Limits, captured, has_gpu, interleaved_s, measure_limits
from bench.kernel_report import Line, kernel_line, peer_line, print_lines
from bench.record import append_line, cpu_name

if TYPE_CHECKING:  # Triton reads its environment when it is imported, and the kernels import it
    from bench.kernel_case import Case, Peer, Run, Setting

COPY_BYTES, PRODUCT_SIZE = 4 << 30, 8192
DRY_COPY_BYTES, DRY_PRODUCT_SIZE = 1 << 20, 32
LONGEST_ERROR = 160


def all_cases() -> tuple[Case, ...]:
    from bench import kernel_attention, kernel_choices, kernel_experts, kernel_products, kernel_rows

    modules = (kernel_attention, kernel_experts, kernel_products, kernel_rows, kernel_choices)
    return tuple(case for module in modules for case in module.CASES)


def measure_case(case: Case, setting: Setting, limits: Limits, rounds: int) -> list[Line]:
    """Of the kernel, if it ran, and of its peers."""
    torch.manual_seed(0)
    try:
        difference, peers, peer_differences, lines = _check(case, setting)
        if not difference <= case.tolerance:
            raise ArithmeticError(f"it is {difference:.3g} off its reference, {case.tolerance:g} are allowed")
        work = case.make(setting, **(case.dry if setting.interpreted else case.full))
        runs, graphs = {}, {}
        runs[""], graphs[""] = captured(setting.device, work.kernel)
        for name in peers:
            try:
                runs[name], graphs[name] = captured(setting.device, work.peers[name].build())
            except Exception as error:
                lines.append(Line(case.name, name, _said(error)))
        times_s = interleaved_s(setting.device, runs, rounds)
        kernel = kernel_line(case, work, limits, difference, times_s.pop(""), graphs[""])
    except Exception as error:
        return [Line(case.name, error=_said(error))]
    timed = [
        peer_line(kernel, case, name, peer_differences[name], seconds, graphs[name])
        for name, seconds in times_s.items()
    ]
    return [kernel, *timed, *lines]


def _check(case: Case, setting: Setting) -> tuple[float, list[str], dict[str, float | None], list[Line]]:
    """The kernel's difference from its reference; peers that compute the same, theirs; and lines of those that do not.

    Raises what the kernel raises.
    """
    work = case.make(setting, **(case.dry if setting.interpreted else case.check))
    expected = work.reference()
    difference = work.difference(work.kernel(), expected)
    differences: dict[str, float | None] = {}
    lines = []
    for name, peer in work.peers.items():
        try:
            differences[name] = _peer_difference(peer, peer.build(), work.difference, expected)
        except Exception as error:
            lines.append(Line(case.name, name, _said(error)))
    return difference, list(differences), differences, lines


def _peer_difference(peer: Peer, run: Run, difference: object, expected: object) -> float | None:
    found = run()
    if peer.tolerance is None:
        return None
    assert callable(difference)
    off = difference(found, expected)
    if not off <= peer.tolerance:
        raise ArithmeticError(f"it computes something else, {off:.3g} off")
    return float(off)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:LONGEST_ERROR]


def measure_all(
    cases: tuple[Case, ...], setting: Setting, limits: Limits, rounds: int, limit_s: float
) -> Iterator[Line]:
    started_s = time.monotonic()
    for case in cases:
        if time.monotonic() - started_s > limit_s:
            yield Line(case.name, error=f"not begun: {limit_s:g} s had passed")
            continue
        for line in measure_case(case, setting, limits, rounds):
            shown = line.error or f"{(line.median_s or 0) * 1e6:.1f} us"
            print(f"{line.what}{': ' if line.peer else ''}{line.peer}: {shown}", file=sys.stderr, flush=True)
            yield line
        gc.collect()
        if setting.device.type == "cuda":
            torch.compiler.reset()  # it compiles a function for so many shapes and no more
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=25, help="of each figure (default: %(default)s)")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--limit-s", type=float, default=540, help="no case begins after it (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/kernels.jsonl"), help="gets one JSON line more")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, tiny; its figures mean nothing")
    options = parser.parse_args()
    if not options.dry_run and not has_gpu("bench.kernels"):
        return 2
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.kernel_case import Setting

    setting = Setting(
        torch.device("cpu" if options.dry_run else "cuda"),
        torch.float16 if options.dry_run else torch.bfloat16,
        options.dry_run,
    )
    card = cpu_name() if options.dry_run else torch.cuda.get_device_properties(setting.device).name
    title = f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(title, file=sys.stderr, flush=True)
    sizes = (DRY_COPY_BYTES, DRY_PRODUCT_SIZE) if options.dry_run else (COPY_BYTES, PRODUCT_SIZE)
    limits = measure_limits(setting.device, card, *sizes, options.rounds)
    cases = tuple(case for case in all_cases() if options.only in case.name)
    lines = list(measure_all(cases, setting, limits, options.rounds, options.limit_s))
    print_lines(f"{title}: a dry run, its figures mean nothing" if options.dry_run else title, limits, lines)
    about = {"name": card, "cuda": torch.version.cuda}
    results = [dataclasses.asdict(line) for line in lines]
    append_line(options.results, "kernels", options, results, device=about, limits=dataclasses.asdict(limits))
    return 1 if any(line.error and not line.peer for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
