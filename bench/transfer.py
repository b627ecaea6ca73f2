"""The transports between two processes, beside a memcpy, a raw tuned socket and libucp's own ucx_perftest.

A measurement moves the same bytes as one transfer, in pieces of one size; the smallest size is a plan between unlike
layouts (one KV head of one block each, from eight ranks to one). Contenders take turns; rates are medians over rounds.

A row with a target has a base of its own, measured right before and right after each turn: the ratio is to the mean of
the two, and the turn counts if they are within 15 % of each other. A row of which less than half of the turns count is
unsteady and says nothing of its target; all its turns are shown then.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.record import append_line
from bench.transfer_contenders import GATHERED, KINDS, WHOLE, Measure, contenders, ranks
from kvtransfer.libucp import load
from kvtransfer.routes import HandoffPlan

EXAMPLES = """examples:
  python -m bench.transfer                      about a minute and a half
  python -m bench.transfer --rounds 9 --mib 128
"""
PIECE_BYTES = (GATHERED, 64 << 10, 1 << 20, WHOLE)
TURNS = 4  # of each row in a round
STEADY = 0.15


class Target(NamedTuple):
    what: str
    ours: tuple[str, int]  # contender, piece size
    theirs: tuple[str, int]
    at_least: float


TARGETS = [
    Target("shared memory, 1 MiB / memcpy", ("ucx, shared memory", 1 << 20), ("memcpy", 1 << 20), 0.8),
    Target("shared memory, 16 MiB / memcpy", ("ucx, shared memory", WHOLE), ("memcpy", WHOLE), 0.8),
    Target("shared memory, 64 KiB / memcpy", ("ucx, shared memory", 64 << 10), ("memcpy", 64 << 10), 0.6),
    Target("TCP, 16 MiB / raw socket", ("sockets, TCP", WHOLE), ("raw socket, TCP", WHOLE), 0.85),
    Target("TCP, 64 KiB / raw socket", ("sockets, TCP", 64 << 10), ("raw socket, TCP", WHOLE), 0.6),
    Target("Unix socket, 16 MiB / raw socket", ("sockets, Unix", WHOLE), ("raw socket, Unix", WHOLE), 0.85),
    *(Target(f"{name}, gathered / contiguous", (name, GATHERED), (name, WHOLE), 0.7) for name in KINDS),
]


class Turn(NamedTuple):
    """In GB/s."""

    before: float  # the base
    ours: float
    after: float  # the base again

    @property
    def ratio(self) -> float:
        return 2.0 * self.ours / (self.before + self.after)

    @property
    def counts(self) -> bool:
        return abs(self.before - self.after) <= STEADY * min(self.before, self.after)


class Row(NamedTuple):
    ratios: list[float]  # of the turns that count; of all where the row is unsteady
    num_counting: int
    num_turns: int

    @property
    def is_steady(self) -> bool:
        return 2 * self.num_counting >= self.num_turns


def row_of(turns: list[Turn]) -> Row:
    counting = [turn.ratio for turn in turns if turn.counts]
    row = Row(counting, len(counting), len(turns))
    return row if row.is_steady else row._replace(ratios=[turn.ratio for turn in turns])


def main() -> None:
    options = parse_arguments()
    rates: dict[str, dict[int, list[float]]] = {}
    turns: dict[Target, list[Turn]] = {}
    with contenders(options.mib) as found:
        targets = [target for target in TARGETS if {target.ours[0], target.theirs[0]} <= set(found)]
        for each in range(options.rounds + 1):
            for size in PIECE_BYTES:
                for name, measure in found.items():
                    rate = measure(size)
                    if each:  # the first touches the pages
                        rates.setdefault(name, {}).setdefault(size, []).append(rate)
            for target in targets if each else []:
                turns.setdefault(target, []).extend(turn_of(target, found) for _ in range(TURNS))
    report(rates, {target: row_of(of) for target, of in turns.items()}, plan_ms(), options)


def turn_of(target: Target, found: dict[str, Measure]) -> Turn:
    (ours, our_size), (theirs, their_size) = target.ours, target.theirs
    return Turn(found[theirs](their_size), found[ours](our_size), found[theirs](their_size))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.transfer",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="of all contenders (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=64, help="moved by one measurement (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/transfer.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


def plan_ms() -> float:
    """tp8 to one rank, 80 layers, 32,768 tokens; the best of five."""
    source, target = (ranks(tp, 80, 2048) for tp in (8, 1))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        HandoffPlan(source, range(2048), target, range(2048), 0, 32_768).of()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


def report(
    measured: dict[str, dict[int, list[float]]], rows: dict[Target, Row], planned_ms: float, options: argparse.Namespace
) -> None:
    medians = {name: {size: statistics.median(rates) for size, rates in by.items()} for name, by in measured.items()}
    rates = Table(title=f"GB/s, {options.mib} MiB as one transfer in pieces, median of {options.rounds} rounds")
    rates.add_column("")
    for size in PIECE_BYTES:
        rates.add_column(f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB", justify="right")
    for name, by in medians.items():
        rates.add_row(name, *(f"{by[size]:.2f}" if by[size] else "" for size in PIECE_BYTES))
    ratios = Table(title="to the base of the same turn, median (smallest to largest)")
    for column in ("", "ratio", "", "count", "target"):
        ratios.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for target, row in rows.items():
        median, spread = statistics.median(row.ratios), f"{min(row.ratios):.2f} to {max(row.ratios):.2f}"
        said = "unsteady" if not row.is_steady else "" if median >= target.at_least else "missed"
        counted = f"{row.num_counting} of {row.num_turns}"
        ratios.add_row(target.what, f"{median:.2f}", spread, counted, f"{target.at_least} {said}")
    met = "" if planned_ms < 5 else "missed"
    ratios.add_row("plan, 32,768 tokens, 80 layers, tp8 to tp1", f"{planned_ms:.1f} ms", "", "", f"5 ms {met}")
    console = Console()
    console.print(rates)
    console.print(ratios)
    results = {
        "gb_per_s": {name: {str(size): round(rate, 3) for size, rate in by.items()} for name, by in medians.items()},
        "ratios": {
            target.what: row._asdict() | {"ratios": [round(ratio, 3) for ratio in row.ratios], "steady": row.is_steady}
            for target, row in rows.items()
        },
        "plan_ms": round(planned_ms, 2),
    }
    append_line(options.results, "transfer", options, results, libucp=load().version)


if __name__ == "__main__":
    main()
