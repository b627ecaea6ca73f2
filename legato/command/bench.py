"""`legato bench`."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import secrets
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from legato.command import options, terminal

if TYPE_CHECKING:
    from legato.bench.report import Report
    from legato.bench.run import Run
    from legato.bench.settings import Settings

HELP = """Load a cluster with real prompts and measure what its clients see: TTFT, ITL, TPOT, end to end, goodput.

An open loop (--rate, --trace) sends when requests are due, waits for no answer, and times from when they were due. A
closed loop (--concurrency) keeps a number in flight, and times from when it sent.

\b
  legato bench                                             4 in flight, 64 requests
  legato bench --concurrency 16 --duration 60
  legato bench --rate 2 --requests 200 --slo-ttft-ms 500 --slo-tpot-ms 80
  legato bench --rate 2 --prompt-tokens 128-1024 --output-tokens lognormal:100,0.6
  legato bench --prompts mt_bench_question.jsonl --rate 1 --plot run.png
  legato bench --trace azure_code.csv.gz --speed 0.2 --max-requests 100 --scale-lengths fit
  legato bench --trace mooncake.jsonl.gz --duration 120 --json > run.json

Ctrl-C stops it and shows what was measured until then. docs/bench.md says what each figure is.
"""
REFRESH_S = 0.25


def bench(
    address: options.Address = options.DEFAULT_ADDRESS,
    api_key: options.ApiKey = "",
    model: options.Model = "",
    rate: Annotated[float | None, typer.Option("--rate", "-r", help="Open loop: Poisson, requests/s.")] = None,
    concurrency: Annotated[
        int | None,
        typer.Option("--concurrency", "-c", help="Closed loop: requests in flight.", show_default="4, with no --rate"),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Open loop: a Mooncake or Azure trace, maybe .gz.")
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option("--requests", "--max-requests", "-n", help="Requests at most.", show_default="64; a trace: all"),
    ] = None,
    duration_s: Annotated[
        float | None, typer.Option("--duration", "-d", metavar="S", help="Begin none after so many seconds.")
    ] = None,
    warmup: Annotated[int, typer.Option("--warmup", help="Requests answered before, in no figure.")] = 4,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help='JSON lines as MT-Bench has, or {"prompt": "..."}.'),
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option("--prompt-tokens", metavar="LENGTHS", help="N, LOW-HIGH, normal:M,SD, lognormal:MEDIAN,SIGMA."),
    ] = None,
    output_tokens: Annotated[
        str | None,
        typer.Option(
            "--output-tokens", metavar="LENGTHS", help="The same, at most.", show_default="128; a trace: its own"
        ),
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        typer.Option("--ignore-eos/--stop-at-eos", help="Answers exactly that long.", show_default="for a trace"),
    ] = None,
    speed: Annotated[float, typer.Option("--speed", help="Times as fast as the trace was.")] = 1.0,
    scale_lengths: Annotated[
        str, typer.Option("--scale-lengths", metavar="F", help="Of a trace; fit: into the model's context.")
    ] = "1",
    temperature: options.Temperature = 0.0,
    speculation: options.Speculation = None,
    timeout_s: Annotated[
        float, typer.Option("--timeout-s", "--timeout", help="Seconds that a request may take.")
    ] = 120.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Same seed, same load.")] = 0,
    nonce: Annotated[
        int | None,
        typer.Option(
            "--nonce", help="What prompts begin with; the same again finds its prefixes cached.", show_default="drawn"
        ),
    ] = None,
    slo_ttft_ms: Annotated[float | None, typer.Option("--slo-ttft-ms", help="For goodput.")] = None,
    slo_itl_ms: Annotated[
        float | None, typer.Option("--slo-itl-ms", help="For goodput: p99 of a request's own.")
    ] = None,
    slo_tpot_ms: Annotated[float | None, typer.Option("--slo-tpot-ms", help="For goodput.")] = None,
    slo_e2e_ms: Annotated[float | None, typer.Option("--slo-e2e-ms", help="For goodput.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Distributions, timeline, stages.")
    ] = None,
    as_json: options.AsJson = False,
) -> int:
    """Long, for typer reads the options from its arguments; what it does is one Settings."""
    from legato.bench.lengths import parse_lengths
    from legato.bench.settings import Settings, Slo

    settings = Settings(
        rate=rate,
        concurrency=concurrency,
        trace=trace,
        requests=requests,
        duration_s=duration_s,
        warmup=warmup,
        prompts=prompts,
        prompt_tokens=None if prompt_tokens is None else parse_lengths(prompt_tokens, "--prompt-tokens"),
        output_tokens=None if output_tokens is None else parse_lengths(output_tokens, "--output-tokens"),
        ignore_eos=ignore_eos,
        speed=speed,
        scale_lengths=_factor(scale_lengths),
        model=model,
        temperature=temperature,
        speculation=speculation,
        timeout_s=timeout_s,
        seed=seed,
        nonce=100_000 + secrets.randbelow(900_000) if nonce is None else nonce,
        slo=Slo(slo_ttft_ms, slo_itl_ms, slo_tpot_ms, slo_e2e_ms),
    )
    if plot is not None:
        _check_plot(plot)
    run = asyncio.run(_run(settings, address, api_key))
    return _show(run, as_json, plot)


def _factor(written: str) -> float | str:
    from legato.bench.settings import FIT
    from legato.errors import InvalidParameter

    if written == FIT:
        return FIT
    try:
        return float(written)
    except ValueError:
        raise InvalidParameter(f"--scale-lengths must be a number or {FIT}, is {written!r}") from None


def _check_plot(path: Path) -> None:
    """Before the load, not after it: that it can be drawn, and written there."""
    from legato.errors import InvalidParameter

    importlib.import_module("matplotlib.figure")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InvalidParameter(f"--plot must be a .png, .svg or .pdf file, is {path.name!r}")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise InvalidParameter(f"--plot cannot be written: {path.parent} is no folder that can be written to")


async def _run(settings: Settings, address: str, api_key: str) -> Run:
    import legato
    from legato.bench.run import Run

    run = Run(settings)
    never = legato.Retries(attempts=1)  # what fails is a figure, not something to hide
    async with legato.AsyncClient(
        address, api_key=api_key or None, timeout_s=settings.timeout_s, retries=never
    ) as client:
        work = asyncio.create_task(run.measure(client))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, work.cancel)
        try:
            async with _progress(run):
                await work
        except asyncio.CancelledError:
            run.is_interrupted = True
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
    return run


@contextlib.asynccontextmanager
async def _progress(run: Run) -> AsyncIterator[None]:
    """A bar on standard error, where that is a terminal; drawn between two looks at the network."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"), TimeElapsedColumn())
    progress = Progress(*columns, console=terminal.err, auto_refresh=False, transient=True)
    if not terminal.err.is_terminal:
        progress.disable = True
    bar = progress.add_task(run.stage, said="", total=None)

    async def draw() -> None:
        while True:
            _update(progress, bar, run)
            progress.refresh()
            await asyncio.sleep(REFRESH_S)

    with progress:
        drawing = asyncio.create_task(draw())
        try:
            yield
        finally:
            drawing.cancel()


def _update(progress: Progress, bar: TaskID, run: Run) -> None:
    load = run.load
    if load is None or run.plan is None:
        progress.update(bar, description=run.stage)
        return
    ended, elapsed_s = load.finished + load.failed, load.elapsed_s
    per_s = load.output_tokens / max(elapsed_s, 1e-9)
    said = f"{ended} answered, {len(load.records) - ended} in flight, {per_s:.0f} tok/s"
    if load.failed:
        said += f", {load.failed} failed"
    total: float | None = run.plan.total
    done = float(ended)
    if total is None and run.settings.duration_s is not None:
        total, done = run.settings.duration_s, min(elapsed_s, run.settings.duration_s)
    progress.update(bar, description=run.stage, total=total, completed=done, said=said)


def _show(run: Run, as_json: bool, plot: Path | None) -> int:
    """The exit code: of an error, where not one request was answered."""
    from legato.bench.report import report

    if run.load is None or not run.load.records:
        terminal.err.print(f"legato: stopped while {run.stage}: nothing was measured", markup=False)
        return terminal.EXIT_INTERRUPTED
    figures = report(run)
    _print(figures, as_json)
    if plot is not None:
        from legato.bench.plot import save_plot

        save_plot(figures, plot)
        terminal.err.print(f"drawn: {plot}", markup=False)
    if run.is_interrupted:
        return terminal.EXIT_INTERRUPTED
    errors: list[Any] = [record.error for record in figures.records if record.error is not None]
    if figures.finished == 0 and errors:
        return terminal.print_error(errors[-1])
    return 0


def _print(figures: Report, as_json: bool) -> None:
    if as_json:
        from legato.bench.report import to_json

        print(json.dumps(to_json(figures)))
        return
    from legato.bench.table import render

    terminal.out.print(render(figures))
