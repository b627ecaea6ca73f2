"""A request's ledger as a waterfall, and its facts as a line."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from legato.types import Answer, Ledger

WIDTH = 44
COLOURS = {
    "route": "blue",
    "queue": "yellow",
    "prefill": "green",
    "exposed transfer": "magenta",
    "decode queue": "yellow",
    "first decode step": "cyan",
}


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def waterfall(ledger: Ledger) -> Table:
    """One bar a stage, each beginning where the one before it ended; the whole width is the time of all."""
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    total_s = ledger.total_s or 1e-9
    before_s = 0.0
    for name, seconds in ledger.stages_s.items():
        start = round(before_s / total_s * WIDTH)
        end = round((before_s + seconds) / total_s * WIDTH)
        bar = Text(" " * start + ("█" * (end - start) or "▏"), style=COLOURS[name])
        table.add_row(name, milliseconds(seconds), bar)
        before_s += seconds
    until = "second token" if ledger.second_token_s is not None else "first token drawn"
    table.add_row(Text(until, style="bold"), Text(milliseconds(ledger.total_s), style="bold"), "")
    table.add_row("first token here", milliseconds(ledger.ttft_s), "")
    return table


def facts(answer: Answer) -> str:
    """Tokens, speed, and where it ran."""
    parts = [f"{answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens, {answer.finish_reason}"]
    if answer.ledger is not None:
        parts.append(f"first token after {milliseconds(answer.ledger.ttft_s)}")
        following = answer.usage.completion_tokens - 1
        if following > 0:
            parts.append(f"then one every {milliseconds((answer.duration_s - answer.ledger.ttft_s) / following)}")
    if answer.usage.proposed_tokens:
        parts.append(f"{answer.usage.accepted_tokens} of {answer.usage.proposed_tokens} guesses were right")
    if answer.route is not None:
        route = answer.route
        path = [worker for worker in (route.prefill_worker_id, route.decode_worker_id) if worker]
        parts.append(" → ".join([route.router_id, *path]))
        if route.transfer is not None:
            moved = route.transfer
            parts.append(f"{size(moved.moved_bytes)} of KV by {moved.transport} in {milliseconds(moved.moving_s)}")
        if route.moves:
            parts.append(f"moved {route.moves} times between decode workers")
        if route.prefill_cached_tokens:
            parts.append(f"{route.prefill_cached_tokens} prompt tokens were cached")
    return "; ".join(parts)


def size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError("unreachable")
