"""The life of a process: signals, standard input, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import asyncio, os, sys
from service.config import RouterConfig
from service.run import arguments, run_service
from spec.errors import InvalidModel, WorkerLost

async def main(stop):
    import uvloop
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)
    how = config.cluster
    if how == "setup":
        raise InvalidModel("layer 3 is missing")
    if how == "lost":
        raise WorkerLost("the device is gone")
    if how == "defect":
        raise ZeroDivisionError("oops")
    print("up", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    if how == "hangs":
        await asyncio.Event().wait()

config, exit_with_stdin = arguments("a test", RouterConfig, os.environ)
sys.exit(run_service(main, exit_with_stdin=exit_with_stdin))
"""


class Process:
    def __init__(self, how: str, *options: str, **environment: str) -> None:
        settings = {"LEGATO_CLUSTER": how, "LEGATO_REDIS_URL": "redis://x", "LEGATO_CLUSTER_KEY": "0123456789"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *options],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **settings, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        _out, error = self.process.communicate(timeout=20)
        return self.process.returncode, error


@pytest.fixture
def started() -> Iterator[list[Process]]:
    processes: list[Process] = []
    yield processes
    for each in processes:
        if each.process.poll() is None:
            each.process.kill()
            each.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(started: list[Process], number: signal.Signals) -> None:
    process = Process("waits")
    started.append(process)
    assert process.line() == "up"
    process.process.send_signal(number)
    assert process.line() == "stopping"
    assert process.end() == (0, "")


def test_a_second_signal_ends_at_once(started: list[Process]) -> None:
    process = Process("hangs")
    started.append(process)
    assert process.line() == "up"
    process.process.send_signal(signal.SIGTERM)
    assert process.line() == "stopping"
    process.process.send_signal(signal.SIGTERM)
    assert process.end()[0] == 130


def test_it_ends_with_the_one_that_started_it(started: list[Process]) -> None:
    process = Process("waits", "--exit-with-stdin")
    started.append(process)
    assert process.line() == "up"
    assert process.process.stdin is not None
    process.process.stdin.close()
    assert process.line() == "stopping"
    assert process.process.wait(20) == 0


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("setup", 78, "legato: INVALID_MODEL: layer 3 is missing\n"),
        ("lost", 1, "legato: WORKER_LOST: the device is gone\n"),
        ("defect", 1, "ZeroDivisionError: oops"),
    ],
)
def test_exit_codes(started: list[Process], how: str, code: int, words: str) -> None:
    process = Process(how)
    started.append(process)
    got, error = process.end()
    assert got == code
    assert words in error
    assert ("Traceback" in error) == (how == "defect")


def test_a_configuration_that_is_not_valid_is_one_line(started: list[Process], tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("max_waitin: 5\n")
    process = Process("waits", "--config", str(file))
    started.append(process)
    code, error = process.end()
    assert code == 78
    assert error.startswith("legato: INVALID_CONFIGURATION:")
    assert "unknown key max_waitin; did you mean max_waiting?" in error
    assert error.count("\n") == 1
