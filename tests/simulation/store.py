"""The Redis of a simulated world, as service/registry.py uses it: three scripts, one channel, and it may go away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, Self

from redis.exceptions import ConnectionError as RedisAway

import service.registry
from tests.simulation.loop import Process, SimulatedLoop
from tests.simulation.network import Network

HOST = "redis"
SOCKET_TIMEOUT_S = 2.0


class Store:
    """What it holds: records under a lease, and who listens. `is_away`: nobody gets through."""

    def __init__(self, loop: SimulatedLoop, network: Network) -> None:
        self.loop = loop
        self.network = network
        self.is_away = False
        self.records: dict[str, tuple[bytes, float]] = {}
        self.listeners: dict[Listener, None] = {}

    def come_back(self, *, empty: bool) -> None:
        self.is_away = False
        if empty:
            self.records.clear()

    def client(self, *_url: Any) -> Client:
        """In place of service.registry.connect."""
        return Client(self, Process.current().name)

    def get(self, key: str) -> bytes | None:
        record, until_s = self.records.get(key, (None, 0.0))
        return record if until_s > self.loop.time() else None

    def publish(self) -> None:
        for listener in self.listeners:
            listener.heard.set()


class Client:
    def __init__(self, store: Store, host: str) -> None:
        self._store = store
        self._host = host

    async def _reach(self) -> None:
        network = self._store.network
        await asyncio.sleep(network.delay_s(self._host, HOST))
        if network.is_blocked(self._host, HOST):
            await asyncio.sleep(SOCKET_TIMEOUT_S)
            raise RedisAway("timeout")
        if self._store.is_away:
            raise RedisAway("connection refused")

    async def get(self, key: str) -> bytes | None:
        await self._reach()
        return self._store.get(key)

    def register_script(self, script: str) -> Any:
        acts = {
            service.registry._WRITE: self._write,
            service.registry._REMOVE: self._remove,
            service.registry._READ: self._read,
        }
        act = acts[script]

        async def run(keys: list[str], args: list[Any]) -> Any:
            await self._reach()
            answer = act(keys, args)
            await asyncio.sleep(self._store.network.delay_s(HOST, self._host))
            return answer

        return run

    def _write(self, keys: list[str], args: list[Any]) -> None:
        before = self._store.get(keys[0])
        self._store.records[keys[0]] = (args[0], self._store.loop.time() + args[1] / 1000)
        if before != args[0]:
            self._store.publish()

    def _remove(self, keys: list[str], args: list[Any]) -> None:
        if self._store.get(keys[0]) == args[0]:
            del self._store.records[keys[0]]
            self._store.publish()

    def _read(self, keys: list[str], args: list[Any]) -> list[bytes]:
        found = [self._store.get(key) for key in list(self._store.records) if key.startswith(args[0])]
        return [record for record in found if record is not None]

    @contextlib.asynccontextmanager
    async def pubsub(self, **_options: Any) -> AsyncIterator[Listener]:
        listener = Listener(self)
        try:
            yield listener
        finally:
            self._store.listeners.pop(listener, None)

    async def aclose(self) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self


class Listener:
    def __init__(self, client: Client) -> None:
        self._client = client
        self.heard = asyncio.Event()

    async def subscribe(self, channel: str) -> None:
        await self._client._reach()
        self._client._store.listeners[self] = None

    async def get_message(self, timeout: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.heard.wait()
        self.heard.clear()
        await self._client._reach()
