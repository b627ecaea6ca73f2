"""`legato top`."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from legato.command import options, terminal
from legato.command.waterfall import milliseconds, size
from legato.types import ClusterView, Quantiles, WorkerView

HELP = """Watch a cluster: pools, queues, KV memory, TTFT and ITL, transfers. Ctrl-C ends it.

\b
  legato top                live
  legato top --once         one table
  legato top --json         one JSON document
"""


def top(
    address: options.Address = options.DEFAULT_ADDRESS,
    api_key: options.ApiKey = "",
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between two looks.")] = 1.0,
    as_json: options.AsJson = False,
) -> None:
    with options.client(address, api_key, 10.0) as client:
        view = client.cluster()
        if as_json:
            print(json.dumps(dataclasses.asdict(view)))
        elif once or not terminal.out.is_terminal:
            terminal.out.print(render(view, None, 1.0))
        else:
            with Live(render(view, None, 1.0), console=terminal.out, auto_refresh=False, screen=True) as live:
                while True:
                    time.sleep(interval_s)
                    before, view = view, client.cluster()
                    live.update(render(view, before, interval_s), refresh=True)


def render(view: ClusterView, before: ClusterView | None, interval_s: float) -> Group:
    """`before` is the look `interval_s` ago, for rates; None: totals are shown alone."""
    heading = Text.assemble(
        (view.router_id, "bold"),
        f"   waiting {view.waiting_requests}   running {view.running_requests}   finished {view.finished_requests}   ",
        (f"failed {view.failed_requests}", "red" if view.failed_requests else ""),
    )
    if not view.registry_reachable:
        heading.append("   Redis is away: the router goes on with the workers it knows", style="red")
    lines = Text(f"TTFT  {_quantiles(view.ttft_s)}\nITL   {_quantiles(view.itl_s)}")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("worker", "state", "pid"):
        table.add_column(name, no_wrap=True)
    for name in (
        "waiting",
        "running",
        "tokens due",
        "KV used",
        "tok/s",
        "KV moved",
        "preempted",
        "moved",
        "refused",
        "quarantined",
    ):
        table.add_column(name, justify="right")
    earlier = {worker.worker_id: worker for worker in before.workers} if before else {}
    for worker in sorted(view.workers, key=lambda one: (one.role != "prefill", one.worker_id)):
        table.add_row(*_row(worker, earlier.get(worker.worker_id), interval_s))
    if not view.workers:
        table.add_row("no workers yet")
    return Group(heading, lines, Text(""), table)


def _row(worker: WorkerView, before: WorkerView | None, interval_s: float) -> list[Text | str]:
    state = {"ready": "green", "draining": "yellow"}.get(worker.state, "red")
    used = (worker.total_blocks - worker.free_blocks) / worker.total_blocks if worker.total_blocks else 0.0
    moved = size(worker.transferred_bytes)
    if before is not None and worker.transferred_bytes > before.transferred_bytes:
        moved += f" (+{size((worker.transferred_bytes - before.transferred_bytes) / interval_s)}/s)"
    return [
        worker.worker_id,
        Text(worker.state, style=state),
        str(worker.pid),
        str(worker.waiting_requests),
        str(worker.running_requests),
        str(worker.charged_tokens),
        f"{used:.0%} of {worker.total_blocks}",
        f"{worker.tokens_per_s:.0f}",
        f"{moved} {worker.transport}",
        str(worker.preemptions),
        str(worker.moved_sequences),
        Text(str(worker.refused_handoffs), style="red" if worker.refused_handoffs else ""),
        Text(str(worker.quarantined_blocks), style="yellow" if worker.quarantined_blocks else ""),
    ]


def _quantiles(quantiles: Quantiles) -> str:
    if not quantiles.count:
        return "none yet"
    shown = " ".join(f"p{name} {milliseconds(getattr(quantiles, f'p{name}')):>10}" for name in ("50", "90", "99"))
    return f"{shown}   (last {quantiles.count})"
