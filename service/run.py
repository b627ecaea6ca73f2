"""From a process's command line to its exit code: what prefill_svc, decode_svc and router start with.

    def main() -> int:
        config, exit_with_stdin = arguments("legato prefill worker", WorkerConfig, os.environ)
        return run_service(lambda stop: serve(config, stop), exit_with_stdin=exit_with_stdin)

Exit codes: 0 asked to stop and stopped; 1 a defect or a lost device; 78 (EX_CONFIG) what it was given cannot be served,
so that starting it again is of no use; 130 a second signal came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from service import logs
from service.config_source import Model, load
from spec.errors import LegatoError, SetupError

EXIT_OK, EXIT_DEFECT, EXIT_CONFIGURATION, EXIT_HARD = 0, 1, 78, 130
ORPHAN_S = 15.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def arguments(
    description: str,
    model: type[Model],
    environment: Mapping[str, str],
    argv: Sequence[str] | None = None,
) -> tuple[Model, bool]:
    """(`--config FILE` with LEGATO_* over it, whether `--exit-with-stdin` was given). Exits with 78 and one line on a
    configuration that is not valid."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML; LEGATO_* variables are taken over it")
    parser.add_argument(
        "--exit-with-stdin",
        action="store_true",
        help="stop when standard input closes, so that no process outlives the one that started it",
    )
    given = parser.parse_args(argv)
    try:
        return load(model, given.config, environment), given.exit_with_stdin
    except SetupError as error:
        say(error)
        raise SystemExit(EXIT_CONFIGURATION) from None


def run_service(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], *, exit_with_stdin: bool = False) -> int:
    """Runs `main(stop)` on uvloop; returns the exit code.

    `stop` is set by SIGTERM, SIGINT or the end of standard input, and `main` then returns in its own time; a second
    signal ends the process at once.
    """
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            runner.run(_main(main, exit_with_stdin))
        except LegatoError as error:
            say(error)
            return EXIT_CONFIGURATION if isinstance(error, SetupError) else EXIT_DEFECT
        except Exception:
            logs.get(__name__).exception("the process ends on a defect")
            return EXIT_DEFECT
    return EXIT_OK


async def _main(main: Callable[[asyncio.Event], Coroutine[Any, Any, None]], exit_with_stdin: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(EXIT_HARD)
        stop.set()

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    if exit_with_stdin:
        threading.Thread(target=_watch_stdin, args=(loop, stop), name="stdin", daemon=True).start()
    try:
        await main(stop)
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


def _watch_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """In a thread, for standard input may be a file, a terminal or /dev/null, which no event loop can wait for.

    Who held the other end is gone and cannot kill what hangs: after ORPHAN_S the process ends itself."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop has ended already
        loop.call_soon_threadsafe(stop.set)
    time.sleep(ORPHAN_S)
    os._exit(EXIT_HARD)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not on Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def say(error: LegatoError) -> None:
    """The one line with which a process ends."""
    print(f"legato: {error.reason}: {error}", file=sys.stderr, flush=True)
