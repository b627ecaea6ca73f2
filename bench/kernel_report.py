"""The lines of bench.kernels: a kernel and its peers, each beside the limit, the other and the goal."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench.device import Limits, quartiles
from bench.gpu_report import met
from bench.kernel_case import Bound, Case, Goal, Work


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Of a kernel, or of a peer beside it. With an error there are no figures."""

    what: str
    peer: str = ""  # empty: the kernel itself
    error: str = ""
    difference: float | None = None  # from the reference
    median_s: float | None = None
    quartiles_s: tuple[float, float] | None = None
    rate: float | None = None  # bytes or FLOP per second
    unit: str = ""
    share: float | None = None  # of the limit that was measured
    ratio: float | None = None  # times as fast as the peer the kernel is
    goal: str = ""
    met: str = ""
    is_captured: bool = False  # a CUDA graph


def kernel_line(case: Case, work: Work, limits: Limits, difference: float, times_s: list[float], graph: bool) -> Line:
    median_s = statistics.median(times_s)
    rate = (work.num_bytes if case.bound == "memory" else work.flop) / median_s
    limit = limit_of(case.bound, limits)
    goal, verdict = "", ""
    if case.goal is not None:
        figure = _judged_figure(case.goal, case.bound, limits, rate)
        goal = _goal_text(case.goal)
        verdict = "no figure" if figure is None else met(figure, case.goal.least, case.goal.stretch)
    return Line(
        case.name,
        difference=difference,
        median_s=median_s,
        quartiles_s=quartiles(times_s),
        rate=rate,
        unit="byte/s" if case.bound == "memory" else "FLOP/s",
        share=None if limit is None else rate / limit,
        goal=goal,
        met=verdict,
        is_captured=graph,
    )


def peer_line(kernel: Line, case: Case, peer: str, difference: float | None, times_s: list[float], graph: bool) -> Line:
    assert kernel.median_s is not None
    median_s = statistics.median(times_s)
    ratio, least = median_s / kernel.median_s, case.peer_goals.get(peer)
    return Line(
        case.name,
        peer,
        difference=difference,
        median_s=median_s,
        quartiles_s=quartiles(times_s),
        ratio=ratio,
        goal="" if least is None else f"≥ {least:.2f} ×",
        met="" if least is None else met(ratio, least, None),
        is_captured=graph,
    )


def limit_of(bound: Bound, limits: Limits) -> float | None:
    if bound == "memory":
        return limits.copy_bytes_per_s
    return limits.product_flop_per_s if bound == "product" else limits.fp8_flop_per_s


def _judged_figure(goal: Goal, bound: Bound, limits: Limits, rate: float) -> float | None:
    if goal.of == "rate":
        return rate
    limit = limit_of(bound, limits)
    if goal.of == "sheet" and bound != "fp8 product":
        limit = (limits.sheet_bytes_per_s if bound == "memory" else limits.sheet_flop_per_s) or limit
    return None if limit is None else rate / limit


def _goal_text(goal: Goal) -> str:
    if goal.of == "rate":
        return f"≥ {goal.least / 1e12:.0f} T/s"
    of = " of the sheet" if goal.of == "sheet" else ""
    stretch = "" if goal.stretch is None else f" ({goal.stretch:.0%})"
    return f"≥ {goal.least:.0%}{stretch}{of}"


def print_lines(title: str, limits: Limits, lines: Sequence[Line]) -> None:
    """The table; under it a line for each kernel and peer that could not run."""
    console = Console(width=160)
    table = Table("", "peer", "median", "quartiles", "rate", "share", "× peer", "goal", "met", title=title)
    for line in lines:
        if line.median_s is None or line.quartiles_s is None:
            continue
        low_s, high_s = line.quartiles_s
        rate = ""
        if line.rate is not None:
            rate = f"{line.rate / 1e9:.4g} GB/s" if line.unit == "byte/s" else f"{line.rate / 1e12:.4g} TFLOP/s"
        table.add_row(
            "" if line.peer else line.what,
            line.peer,
            f"{line.median_s * 1e6:.1f} us{'' if line.is_captured else ' *'}",
            f"{low_s * 1e6:.1f} to {high_s * 1e6:.1f}",
            rate,
            "" if line.share is None else f"{line.share:.1%}",
            "" if line.ratio is None else f"{line.ratio:.2f}",
            line.goal,
            line.met,
        )
    console.print(table)
    console.print("* launched by the host, not replayed as a CUDA graph")
    fp8 = "no fp8 product" if limits.fp8_flop_per_s is None else f"fp8 {limits.fp8_flop_per_s / 1e12:.4g}"
    console.print(
        f"limits of this run: copy {limits.copy_bytes_per_s / 1e9:.4g} GB/s, product in bfloat16 "
        f"{limits.product_flop_per_s / 1e12:.4g} TFLOP/s, {fp8}"
    )
    for line in lines:
        if line.error:
            who = f"{line.what}: {line.peer}" if line.peer else line.what
            console.print(f"did not run: {who}: {line.error}", markup=False)
