"""The two tables of bench.disaggregated, and its JSON line."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.heard import Heard, Round
from bench.killed_prefill import RIGHT_WITHIN, Seen
from bench.pools import Pools
from bench.record import append_line

OTHERS_CORES = 0.15  # more, and the figures say little
FIGURES: dict[str, Callable[[Heard], float]] = {
    "TTFT": lambda heard: heard.ttft_s,
    "first to second token": lambda heard: heard.first_to_second_s,
    "to the second token": lambda heard: heard.times_s[1],
    "ITL behind it": lambda heard: heard.itl_s,
}


def report(
    console: Console,
    rounds: Sequence[Round],
    killed: dict[str, list[Seen]],
    gaps: dict[str, dict[str, list[float]]],
    proxy: dict[str, float],
    idle: dict[str, dict[str, float]],
    sides: Sequence[Pools],
    options: argparse.Namespace,
) -> None:
    rows = figures(rounds, [side.name for side in sides])
    console.print(speed_table(rows, [side.name for side in sides], options))
    hop_ms, cpu_us = proxy["hop_s"] * 1e3, proxy["cpu_s_per_token"] * 1e6
    console.print(f"the proxy adds {hop_ms:.2f} ms to an answer, and {cpu_us:.0f} µs of CPU time to a token")
    for name, cores in idle.items():
        console.print(
            f"{name} without a request: {cores['awake']:.2f} cores, {cores['waiting']:.2f} as it waits for its turn"
        )
    console.print(killed_table(killed, gaps["killed"]))
    for name, found in gaps["undisturbed"].items():
        console.print(f"{name}, undisturbed: tokens at most {max(found):.2f} below the model's own in float32")
    others = [cores for one in rounds for cores in one.others_cores.values()]
    if max(others) > OTHERS_CORES:
        usual = statistics.median(others)
        console.print(f"[bold]not quiet[/bold]: others used {usual:.1f} cores in median, at most {max(others):.1f}")
    append_line(
        options.results,
        "disaggregated",
        options,
        rows,
        sides={side.name: side.version for side in sides},
        proxy=proxy,
        idle_cores=idle,
        others_cores=[one.others_cores for one in rounds],
        killed_prefill={
            name: [as_data(one, gap) for one, gap in zip(seen, gaps["killed"][name], strict=True)]
            for name, seen in killed.items()
        },
        gaps=gaps,
    )


def figures(rounds: Sequence[Round], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of each row: seconds, or tokens/s, of every round by side; and how many times ours theirs is, round by round."""
    rows: dict[str, dict[str, list[float]]] = {}
    for one in rounds:
        for name in names:
            for loop, (tokens_per_s, answers) in zip(one.loops, one.sides[name], strict=True):
                values = {} if loop.in_flight == 1 else {"tokens/s": tokens_per_s}
                values |= {each: statistics.median(map(figure, answers)) for each, figure in FIGURES.items()}
                for each, value in values.items():
                    rows.setdefault(f"{each}, {loop.name}", {side: [] for side in names})[name].append(value)
    ours, theirs = names
    found = {}
    for row, sides in rows.items():
        ratios = [other / own for own, other in zip(sides[ours], sides[theirs], strict=True)]
        found[row] = {"sides": sides, "ratio": statistics.median(ratios), "ratios": ratios}
    return found


def speed_table(rows: dict[str, dict[str, Any]], names: Sequence[str], options: argparse.Namespace) -> Table:
    title = f"{options.model}, bfloat16, {options.threads} thread(s) a worker: median of {options.rounds} (spread), ms"
    table = Table("", *names, "theirs / ours", title=title)
    for name, row in rows.items():
        scale = 1.0 if name.startswith("tokens/s") else 1e3
        cells = [_spread([value * scale for value in values], 1) for values in row["sides"].values()]
        table.add_row(name, *cells, _spread(row["ratios"], 2))
    return table


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def killed_table(killed: dict[str, list[Seen]], gaps: dict[str, list[float]]) -> Table:
    title = "the prefill worker is killed while it computes: what each client sees"
    table = Table("", "when it died", "next token", "end", "came", "tokens", title=title)
    for name, seen in killed.items():
        for one, gap in zip(seen, gaps[name], strict=True):
            after = "none" if one.next_token_s is None else f"{one.next_token_s:.2f} s"
            what = one.heard.failure or "the whole answer"
            table.add_row(name, one.was, after, f"{one.end_s:.2f} s", what, _verdict(one.heard, gap))
    return table


def _verdict(heard: Heard, gap: float) -> str:
    if not heard.token_ids:
        return "none"
    return f"{len(heard.token_ids)}, {'right' if gap <= RIGHT_WITHIN else 'WRONG'} (within {gap:.2f})"


def as_data(seen: Seen, gap: float) -> dict[str, Any]:
    heard = dataclasses.asdict(seen.heard)
    del heard["prompt"], heard["sent_s"]
    return heard | {"when": seen.was, "next_token_s": seen.next_token_s, "end_s": seen.end_s, "gap": gap}
