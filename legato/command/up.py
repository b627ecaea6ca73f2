"""`legato up`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from legato.command import options, terminal

if TYPE_CHECKING:
    from service.config import ClusterConfig

HELP = """Start a cluster on this machine: router, prefill and decode workers, Redis.

Prints one line `ready grpc=HOST:PORT` on standard output once it can serve; restarts what dies; Ctrl-C or SIGTERM
stops all within 10 s, exit code 0; so does closing the terminal, but for nohup.

\b
  legato up                                        1 prefill + 1 decode worker, SmolLM2-135M
  legato up --prefill 2 --decode 2 --port 50052
  legato up --model ./my-model --config cluster.yaml
  legato up --adapter poems=./lora-poems           for requests that ask for it
  legato up --redis redis://localhost:6379         instead of an embedded server
"""


def up(
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML; see docs/.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Folder, .gguf file, smollm2 or ORG/NAME.")] = None,
    prefill: Annotated[int | None, typer.Option("--prefill", min=1, help="Prefill workers.")] = None,
    decode: Annotated[int | None, typer.Option("--decode", min=1, help="Decode workers.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Where to listen.")] = None,
    port: Annotated[
        int | None, typer.Option("--port", "-p", min=0, max=65535, help="Of the router; 0: a free one.")
    ] = None,
    redis: Annotated[
        str | None, typer.Option("--redis", metavar="URL", help="A Redis or Valkey that runs already.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", metavar="NAME=FOLDER", help="A LoRA adapter; may be given several times."),
    ] = None,
    run_folder: Annotated[Path | None, typer.Option("--run-folder", help="For logs; a new one by default.")] = None,
) -> int:
    given = {"model": model, "prefill": prefill, "decode": decode, "host": host, "port": port, "redis_url": redis}
    given["engine__adapters"] = ",".join(adapter) if adapter else None
    resolved = cluster_config(config, {key: value for key, value in given.items() if value is not None}, os.environ)
    fetch_model(resolved.model)
    with new_folder(run_folder) as folder:
        return asyncio.run(_up(resolved, folder))


def cluster_config(path: Path | None, given: dict[str, Any], environment: Mapping[str, str]) -> ClusterConfig:
    """The file, LEGATO_* over it, and what the command line gives over both. Raises InvalidConfiguration."""
    from service.config import ClusterConfig, load

    ours = (options.ADDRESS_VARIABLE, options.API_KEY_VARIABLE)
    variables = {name: value for name, value in environment.items() if name not in ours}
    for key, value in given.items():
        variables[f"LEGATO_{key.upper()}"] = str(value)
    return load(ClusterConfig, path, variables)


def fetch_model(name: str) -> None:
    """Once and before the workers ask for it, with a progress bar. Raises InvalidModel."""
    from service.model_source import resolve_model

    columns = (TextColumn("fetching {task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=terminal.err, transient=True, disable=not terminal.err.is_terminal) as progress:
        tasks: list[Any] = []

        def report(fraction: float) -> None:
            if not tasks:
                tasks.append(progress.add_task(name, total=1.0))
                if not terminal.err.is_terminal:
                    terminal.err.print(f"fetching {name}", markup=False)
            progress.update(tasks[0], completed=fraction)

        resolve_model(name, report)


@contextlib.contextmanager
def new_folder(wanted: Path | None) -> Iterator[Path]:
    """For one run's logs and configurations; only ours to read. One that stays empty is removed, unless it was there.

    Raises InvalidConfiguration where nothing can be written."""
    from spec.errors import InvalidConfiguration

    was_there = wanted is not None and wanted.is_dir()
    try:
        if wanted is None:
            folder = Path(tempfile.mkdtemp(prefix="legato-"))
        else:
            wanted.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = wanted.resolve()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        where = wanted or tempfile.gettempdir()
        raise InvalidConfiguration(f"the run folder {where} cannot be used: {error.strerror}") from None
    try:
        yield folder
    finally:
        if not was_there:
            with contextlib.suppress(OSError):  # it holds logs
                folder.rmdir()


def stop_signals() -> list[signal.Signals]:
    """A terminal that is closed (SIGHUP) asks for a stop, unless whoever started this (nohup) keeps it from us."""
    hang_up = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL else []
    return [signal.SIGINT, signal.SIGTERM, *hang_up]


async def _up(config: ClusterConfig, folder: Path) -> int:
    from legato.command.local.board import Board
    from legato.command.local.cluster import LocalCluster, first_of

    board = Board()
    cluster = LocalCluster(config, folder, os.environ, board.changed, board.say)
    stop = asyncio.Event()
    for number in stop_signals():
        asyncio.get_running_loop().add_signal_handler(number, _stop_or_kill, stop, cluster)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        async with board.live(folder):
            await cluster.start()
            ready = asyncio.ensure_future(cluster.wait_ready())
            await first_of(ready, stopping)
            if ready.done():
                ready.result()
                print(f"ready grpc={cluster.address}", flush=True)
                await first_of(cluster.failed, stopping)
            else:
                ready.cancel()
            if cluster.failed.done():
                raise cluster.failed.result()
    finally:
        stopping.cancel()
        await cluster.stop()
    return 0


def _stop_or_kill(stop: asyncio.Event, cluster: Any) -> None:
    """The second signal does not wait for anyone."""
    if stop.is_set():
        cluster.kill()
        sys.stderr.flush()
    stop.set()
