"""The figures as a picture: TTFT, ITL, the run over time, where time went. Loads matplotlib, which `serve` brings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from legato.bench.quantiles import Summary
from legato.bench.record import Record
from legato.bench.report import Report
from legato.bench.table import describe, number

# Okabe and Ito: told apart by those who see fewer colours.
BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#6b6b6b"
STAGE_COLOURS = {
    "load generator": "#bdbdbd",
    "route": "#0072B2",
    "queue": "#E69F00",
    "prefill": "#009E73",
    "exposed transfer": "#CC79A7",
    "decode queue": "#F0E442",
    "first decode step": "#56B4E9",
}
BINS = 40
WIDE = 30.0  # a distribution whose largest is so many times its smallest is drawn over a logarithmic axis


def save_plot(figures: Report, path: Path) -> None:
    """Raises OSError and ValueError where matplotlib cannot write such a file there."""
    picture = Figure(figsize=(13, 8.4), layout="constrained", dpi=120)
    axes = picture.subplots(2, 2)
    settings = figures.run.settings
    model = figures.run.model.id if figures.run.model else ""
    state = "" if not figures.run.is_interrupted else ", stopped early"
    picture.suptitle(f"{describe(settings)}   ·   {model}, {figures.finished} answers, seed {settings.seed}{state}")
    done = [record for record in figures.records if record.is_finished]
    ttfts = [record.ttft_s * 1e3 for record in done if record.ttft_s is not None]
    itls = [itl_s * 1e3 for record in done for itl_s in record.itls_s]
    counted = "due" if settings.kind != "closed" else "sent"
    _distribution(
        axes[0][0], ttfts, figures.latency_ms["ttft"], settings.slo.ttft_ms, f"TTFT, from when {counted}", "requests"
    )
    _distribution(axes[0][1], itls, figures.latency_ms["itl"], settings.slo.itl_ms, "ITL, between tokens", "tokens")
    _timeline(axes[1][0], figures)
    _stages(axes[1][1], done)
    if figures.window_s > 0:
        for axis in axes[1]:
            axis.set_xlim(0, figures.window_s)
    picture.savefig(path)


def _distribution(
    axis: Any, samples: Sequence[float], one: Summary | None, limit: float | None, title: str, of_what: str
) -> None:
    axis.set_title(title, loc="left")
    if one is None:
        _empty(axis)
        return
    low, high = min(samples), one.max
    if high > WIDE * max(low, 1e-3):
        low = max(low, high / 1e5, 1e-3)
        edges = [low * (high / low) ** (step / BINS) for step in range(BINS + 1)]
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    else:
        width = (high - low) or max(high * 0.01, 1e-3)
        edges = [low + width * step / BINS for step in range(BINS + 1)]
    axis.hist([min(max(sample, edges[0]), edges[-1]) for sample in samples], bins=edges, color=BLUE, alpha=0.85)
    for name, value, style in (("p50", one.p50, "-"), ("p90", one.p90, "--"), ("p99", one.p99, ":")):
        axis.axvline(value, color="black", linestyle=style, linewidth=1.2, label=f"{name}  {number(value)} ms")
    if limit is not None:
        axis.axvline(limit, color=RED, linewidth=1.6, label=f"SLO  {limit:,g} ms")
    axis.set_xlabel("milliseconds")
    axis.set_ylabel(of_what)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(framealpha=0.9, edgecolor="none")
    _quiet(axis)


def _timeline(axis: Any, figures: Report) -> None:
    """Arrivals and failures as bars, output tokens/s as a line, requests in flight as an area behind."""
    axis.set_title("The run over time", loc="left")
    if not figures.records or figures.window_s <= 0:
        _empty(axis)
        return
    width_s = nice_width_s(figures.window_s)
    count = max(1, round(figures.window_s / width_s))  # the last is half to one and a half times as long
    middles_s = [(place + 0.5) * width_s for place in range(count)]
    came = binned([(one.due_s, 1) for one in figures.records], width_s, count)
    failed = binned([(one.ended_s, 1) for one in figures.records if one.error and one.ended_s], width_s, count)
    tokens = binned([piece for one in figures.records for piece in one.pieces], width_s, count)
    axis.bar(middles_s, [n / width_s for n in came], width_s * 0.9, color=ORANGE, alpha=0.7, label="arrivals/s")
    if any(failed):
        axis.bar(middles_s, [n / width_s for n in failed], width_s * 0.45, color=RED, label="failures/s")
    axis.set_xlabel("seconds after the start")
    axis.set_ylabel("requests/s")
    axis.set_ylim(0, 1.35 * max([*came, *failed]) / width_s)
    speed = axis.twinx()
    lengths_s = [width_s] * (count - 1) + [figures.window_s - (count - 1) * width_s]
    per_s = [n / length_s for n, length_s in zip(tokens, lengths_s, strict=True)]
    speed.plot(middles_s, per_s, color=BLUE, marker="o", markersize=3, label="output tokens/s")
    speed.set_ylabel("tokens/s", color=BLUE)
    speed.set_ylim(0, 1.35 * max([*per_s, 1]))
    lines = [side.get_legend_handles_labels() for side in (axis, speed)]
    handles, names = ([one for side in lines for one in side[part]] for part in (0, 1))
    axis.legend(handles, names, frameon=False, loc="upper left", ncols=len(names))
    _quiet(axis)
    speed.spines["top"].set_visible(False)


def _stages(axis: Any, done: Sequence[Record]) -> None:
    """Mean time to the second token of the requests that came in each part of the run, by stage."""
    axis.set_title("Where the time to the second token went, by arrival", loc="left")
    whole = [one for one in done if one.ledger and one.ledger.second_token_s is not None]
    if not whole:
        _empty(axis)
        return
    end_s = max(record.due_s for record in whole) or 1.0
    width_s = nice_width_s(end_s)
    groups: dict[int, list[Record]] = {}
    for record in whole:
        groups.setdefault(int(record.due_s / width_s), []).append(record)
    below = dict.fromkeys(groups, 0.0)
    for stage, colour in STAGE_COLOURS.items():
        heights = {place: _mean_ms(group, stage) for place, group in groups.items()}
        if any(heights.values()):
            middles_s = [(place + 0.5) * width_s for place in groups]
            lows = [below[place] for place in groups]
            axis.bar(middles_s, list(heights.values()), width_s * 0.9, bottom=lows, color=colour, label=stage)
        below = {place: below[place] + height for place, height in heights.items()}
    axis.set_xlabel("arrival, seconds after the start")
    axis.set_ylabel("mean milliseconds")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_ylim(0, 1.35 * max(below.values()))
    axis.legend(frameon=False, loc="upper left", ncols=3, fontsize="small")
    _quiet(axis)


def _mean_ms(group: Sequence[Record], stage: str) -> float:
    """Of a ledger's stage, or of what passed before the client sent."""
    found = [
        one.sent_s - one.due_s if stage == "load generator" else one.ledger.stages_s.get(stage, 0.0)
        for one in group
        if one.ledger is not None
    ]
    return sum(found) / len(found) * 1e3


def nice_width_s(span_s: float) -> float:
    """1, 2 or 5 times a power of ten, so that 15 to 40 of them cover the span."""
    rough_s = max(span_s, 1e-3) / BINS
    power = 10.0 ** math.floor(math.log10(rough_s))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough_s * 0.999)


def binned(events: Sequence[tuple[float, int]], width_s: float, count: int) -> list[int]:
    """Sums of the events' weights in `count` bins from 0; what comes after the last is in the last."""
    sums = [0] * count
    for at_s, weight in events:
        sums[min(count - 1, max(0, int(at_s / width_s)))] += weight
    return sums


def _empty(axis: Any) -> None:
    axis.text(0.5, 0.5, "nothing to show", ha="center", va="center", color=GREY, transform=axis.transAxes)
    axis.set_xticks([])
    axis.set_yticks([])


def _quiet(axis: Any) -> None:
    axis.spines["top"].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
