"""The figures for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from legato.bench.quantiles import Summary
from legato.bench.report import Report
from legato.bench.settings import Settings, Slo

ROWS = {
    "ttft": "TTFT (first token)",
    "itl": "ITL (between tokens)",
    "tpot": "TPOT (a request's mean)",
    "end_to_end": "end to end",
    "longest_gap": "longest gap of a request",
}


def render(figures: Report) -> Group:
    parts: list[RenderableType] = [_heading(figures), Text(""), _latencies(figures), Text(""), _facts(figures)]
    if figures.ledger_ms:
        parts += [Text(""), _ledger(figures)]
    parts += [Text(f"warning: {warning}.", style="yellow") for warning in figures.warnings]
    return Group(*parts)


def describe(settings: Settings) -> str:
    """The load in a few words."""
    if settings.rate is not None:
        return f"open loop, Poisson at {settings.rate:g}/s"
    if settings.trace is not None:
        speed = "" if settings.speed == 1 else f" at {settings.speed:g} times its speed"
        return f"open loop, {settings.trace.name}{speed}"
    return f"closed loop, {settings.users} in flight"


def _heading(figures: Report) -> Text:
    run = figures.run
    assert run.model is not None and run.plan is not None, "something was measured"
    counted = "from when it was due" if run.settings.kind != "closed" else "from when it was sent"
    heading = Text.assemble(
        (describe(run.settings), "bold"), f"; {run.model.id}, seed {run.settings.seed}; each timed {counted}"
    )
    if run.plan.warmup:
        heading.append(f"; {len(run.plan.warmup)} warm-up requests left out")
    if run.is_interrupted:
        heading.append(
            f"\nstopped after {figures.window_s:.1f} s; this is what was measured until then", style="yellow"
        )
    return heading


def _latencies(figures: Report) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("milliseconds")
    for name in ("mean", "p50", "p90", "p99", "max", "samples"):
        table.add_column(name, justify="right")
    for key, name in ROWS.items():
        table.add_row(name, *_cells(figures.latency_ms[key]))
    return table


def _cells(one: Summary | None) -> list[str]:
    if one is None:
        return ["-"] * 5 + ["0"]
    return [*(number(value) for value in (one.mean, one.p50, one.p90, one.p99, one.max)), f"{one.count:,}"]


def number(value: float) -> str:
    """Four figures are enough of any."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def _facts(figures: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    failures = ", ".join(f"{count} {reason}" for reason, count in figures.failures.items())
    sent = f"{len(figures.records)} sent, {figures.finished} finished, {figures.failed} failed"
    table.add_row(
        "requests", Text.assemble(sent, (f" ({failures})", "red") if failures else "", _unfinished(figures.unfinished))
    )
    offered = "" if figures.offered_per_s is None else f", {figures.offered_per_s:.2f}/s came"
    table.add_row("rate", f"{figures.per_s(figures.finished):.2f} requests/s over {figures.window_s:.1f} s{offered}")
    loaded = figures.loaded_tokens_per_s
    until = "" if loaded is None else f" ({number(loaded)} until the last arrival)"
    prompt, cached = figures.prompt_tokens, figures.cached_tokens
    share = f" ({cached / prompt:.0%} of them cached)" if cached else ""
    table.add_row(
        "output", f"{number(figures.per_s(figures.output_tokens))} tokens/s{until}; {figures.output_tokens:,} tokens"
    )
    table.add_row("prompts", f"{number(figures.per_s(prompt))} tokens/s; {prompt:,} tokens{share}")
    if figures.acceptance is not None:
        guessed = f"{figures.accepted_tokens:,} of {figures.proposed_tokens:,} guesses right, {figures.acceptance:.0%}"
        table.add_row("speculation", f"{guessed}; {figures.accepted_tokens / figures.output_tokens:.0%} of the output")
    if figures.met is not None:
        share = f"{figures.met / max(1, len(figures.records)):.1%}"
        goodput = f"{figures.per_s(figures.met):.2f} requests/s"
        table.add_row("goodput", Text.assemble((goodput, "bold"), f"; {share} kept {_slo(figures.run.settings.slo)}"))
    if figures.handoffs:
        moved_mib = figures.moved_bytes / 2**20
        table.add_row(
            "hand-over", f"{figures.handoffs} of {figures.finished} requests, {moved_mib:,.1f} MiB of KV moved"
        )
    lag, delay = figures.schedule_lag_ms, figures.loop_delay_ms
    late = "" if lag is None else f"sent p50 {lag.p50:.1f}, p99 {lag.p99:.1f}, at most {lag.max:.1f} ms late; "
    busy = "" if delay is None else f"its event loop p99 {delay.p99:.1f} ms late"
    table.add_row("generator", late + busy)
    return table


def _unfinished(count: int) -> str:
    return f", {count} unfinished" if count else ""


def _slo(slo: Slo) -> str:
    limits = {"TTFT": slo.ttft_ms, "p99 ITL": slo.itl_ms, "TPOT": slo.tpot_ms, "end to end": slo.e2e_ms}
    return ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in limits.items() if limit is not None)


def _ledger(figures: Report) -> Table:
    """Where the time to the second token went."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("to the second token, ms")
    for name in ("mean", "p50", "p90", "p99", "share"):
        table.add_column(name, justify="right")
    total = sum(one.mean for one in figures.ledger_ms.values()) or 1.0
    for stage, one in figures.ledger_ms.items():
        cells = (number(value) for value in (one.mean, one.p50, one.p90, one.p99))
        table.add_row(stage, *cells, f"{one.mean / total:.0%}")
    return table
