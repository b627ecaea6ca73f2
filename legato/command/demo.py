"""`legato demo`, which `make demo` runs: the whole thing once, in about a minute."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel

from legato.command import terminal, up
from legato.command.waterfall import facts, waterfall

if TYPE_CHECKING:
    from legato.command.local.cluster import LocalCluster
    from legato.types import Answer
    from service.config import ClusterConfig

HELP = """Start router, 2 prefill and 2 decode workers here, ask a small real chat model three questions at once, show
where each ran and where its time went, and stop everything.

\b
  legato demo
  legato demo --model ./my-model --max-tokens 96
"""
QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Name three instruments of an orchestra.",
)
LANE_COLOURS = ("cyan", "magenta", "green")
LINE_WIDTH = 72


@dataclasses.dataclass(slots=True)
class Lane:
    """One answer as it is written."""

    number: int
    question: str
    text: str = ""
    printed: int = 0  # characters of it that a plain output has shown
    first_token_s: float = 0.0  # by the monotonic clock
    answer: Answer | None = None


def demo(
    model: Annotated[str, typer.Option("--model", help="Folder, .gguf file, smollm2 or ORG/NAME.")] = "smollm2",
    prefill: Annotated[int, typer.Option("--prefill", min=1, help="Prefill workers.")] = 2,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Decode workers.")] = 2,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens of an answer at most.")] = 64,
) -> int:
    given = {"model": model, "prefill": prefill, "decode": decode, "port": 0}
    config = up.cluster_config(None, given, {})
    up.fetch_model(config.model)
    with up.new_folder(None) as folder:
        return asyncio.run(_demo(config, folder, max_tokens))


async def _demo(config: ClusterConfig, folder: Path, max_tokens: int) -> int:
    from legato.command.local.board import Board
    from legato.command.local.cluster import LocalCluster

    started_s = time.monotonic()
    board = Board()
    cluster = LocalCluster(config, folder, os.environ, board.changed, board.say)
    work = asyncio.current_task()
    assert work is not None
    signals = up.stop_signals()
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    try:
        async with board.live(folder):
            await cluster.start()
            await cluster.wait_ready()
        terminal.err.print(f"ready after {time.monotonic() - started_s:.1f} s; three questions at once:\n")
        board.is_quiet = True
        lanes = await _ask(cluster, max_tokens)
        _report(lanes, started_s)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        for number in signals:
            asyncio.get_running_loop().remove_signal_handler(number)
        await cluster.stop()
    terminal.out.print("\nEverything was stopped.")
    return 0


async def _ask(cluster: LocalCluster, max_tokens: int) -> list[Lane]:
    import legato

    lanes = [Lane(number, question) for number, question in enumerate(QUESTIONS, 1)]
    async with legato.AsyncClient(cluster.address, timeout_s=120) as client:
        if not terminal.out.is_terminal:
            await asyncio.gather(*(_follow(client, lane, max_tokens, _print_lines) for lane in lanes))
            return lanes
        with Live(_panels(lanes), console=terminal.out, auto_refresh=False) as live:

            def draw(lane: Lane) -> None:
                live.update(_panels(lanes), refresh=True)

            await asyncio.gather(*(_follow(client, lane, max_tokens, draw) for lane in lanes))
    return lanes


async def _follow(client: Any, lane: Lane, max_tokens: int, show: Any) -> None:
    async with client.stream_chat(
        [{"role": "user", "content": lane.question}], max_tokens=max_tokens, temperature=0.0
    ) as stream:
        async for piece in stream:
            lane.first_token_s = lane.first_token_s or time.monotonic()
            lane.text += terminal.printable(piece.text)
            show(lane)
        lane.answer = stream.answer
    show(lane)


def _panels(lanes: list[Lane]) -> Columns:
    return Columns(
        [
            Panel(lane.text, title=lane.question, border_style=LANE_COLOURS[lane.number - 1], title_align="left")
            for lane in lanes
        ],
        equal=True,
        expand=True,
    )


def _print_lines(lane: Lane) -> None:
    """Where there is no terminal: each lane line by line, as lines fill."""
    while True:
        rest = lane.text[lane.printed :]
        end = rest.find("\n")
        if end < 0 or end > LINE_WIDTH:
            end = rest.rfind(" ", 0, LINE_WIDTH) if len(rest) > LINE_WIDTH else -1
        if end < 0:
            if lane.answer is None or not rest:
                return
            end = len(rest)
        terminal.out.print(f"[{lane.number}] {rest[:end]}", markup=False)
        lane.printed += end + 1


def _report(lanes: list[Lane], started_s: float) -> None:
    for lane in lanes:
        answer = lane.answer
        assert answer is not None, "a stream that ends without an error has its answer"
        terminal.out.print(f"\n{lane.number}. {lane.question}", style=LANE_COLOURS[lane.number - 1], markup=False)
        terminal.out.print(f"   {facts(answer)}", markup=False)
        if answer.ledger is not None:
            terminal.out.print(waterfall(answer.ledger))
    first_s = min(lane.first_token_s for lane in lanes) - started_s
    terminal.out.print(f"\nfirst token {first_s:.1f} s after the start", style="bold")
    terminal.out.print(
        "\nKeep a cluster running:   .venv/bin/legato up --prefill 2 --decode 2      (Ctrl-C stops it)\n"
        'Call it from a shell:     .venv/bin/legato generate "Once upon a time" --trace\n'
        "                          .venv/bin/legato chat\n"
        "and from Python:          import legato\n"
        '                          with legato.Client("localhost:50051") as client:\n'
        '                              for piece in client.stream("Once upon a time", max_tokens=64):\n'
        '                                  print(piece.text, end="", flush=True)',
        markup=False,
    )
