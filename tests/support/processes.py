"""A cluster of real processes, each on a port of its own that it has again when it is started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
from gates import Gates
from networks import Networks

from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.config import EngineConfig, HandoffConfig, RouterConfig, WorkerConfig, save
from service.ports import free_port

KEY = "a key for tests"
READY_S, SETTLE_S = 60.0, 20.0


class Processes:
    """`addresses` by name: router-0.., prefill-0.., decode-0... Made by processes()."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gates = Gates(folder / "gates")
        self.gates.folder.mkdir()
        self.addresses: dict[str, str] = {}
        self.pids: dict[str, int] = {}
        self.at_start: dict[str, dict[str, int]] = {}
        self._namespaces: dict[str, str] = {}
        self._nursery = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "nursery.py"), str(self.gates.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), str(Path(__file__).parent)])},
        )

    # -- their life ---------------------------------------------------------------------------------------------------

    def add(self, name: str, config: RouterConfig | WorkerConfig, namespace: str = "") -> None:
        """`namespace`: a file of /run/netns."""
        self.addresses[name] = f"{config.host}:{config.port}"
        self._namespaces[name] = namespace
        save(config, self.folder / f"{name}.yaml")
        self.start(name)

    def start(self, name: str) -> None:
        assert self._nursery.stdin is not None and self._nursery.stdout is not None
        asked = {
            "role": name.partition("-")[0],
            "name": name,
            "config": str(self.folder / f"{name}.yaml"),
            "log": str(self.folder / f"{name}.log"),
            "netns": self._namespaces[name],
        }
        self._nursery.stdin.write(json.dumps(asked) + "\n")
        self._nursery.stdin.flush()
        self.pids[name] = json.loads(self._nursery.stdout.readline())["pid"]

    def send(self, name: str, number: signal.Signals) -> None:
        os.kill(self.pids[name], number)

    def kill(self, name: str) -> None:
        """Returns when it is gone, and its port free."""
        self.send(name, signal.SIGKILL)
        while self.lives(name):
            time.sleep(0.002)

    def lives(self, name: str) -> bool:
        return Path(f"/proc/{self.pids[name]}").exists()

    def of(self, pool: str) -> list[str]:
        return [name for name in self.addresses if name.startswith(pool)]

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def close(self) -> None:
        assert self._nursery.stdin is not None
        for name in self.pids:
            with contextlib.suppress(ProcessLookupError):
                self.send(name, signal.SIGKILL)
        self._nursery.stdin.close()
        self._nursery.wait(10)

    # -- what they say ------------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Every router is linked to every worker of now."""
        deadline_s = time.monotonic() + READY_S
        for router in self.of("router"):
            while not await self._sees_all(router):
                dead = [name for name in self.addresses if not self.lives(name)]
                assert not dead, f"{dead} ended: {self.log(dead[0])[-2000:]}"
                assert time.monotonic() < deadline_s, f"{router} does not see all: {self.log(router)[-2000:]}"
                await asyncio.sleep(0.05)

    async def _sees_all(self, router: str) -> bool:
        from legato import AsyncClient, Retries
        from legato.errors import LegatoError

        expected = {name: self.pids[name] for name in (*self.of("prefill"), *self.of("decode"))}
        async with AsyncClient(self.addresses[router], timeout_s=2.0, retries=Retries(attempts=1)) as client:
            try:
                workers = (await client.cluster()).workers
            except LegatoError:
                return False
        return {worker.worker_id: worker.pid for worker in workers if worker.state == "ready"} == expected

    async def counts_of(self, name: str) -> dict[str, int]:
        async with channel(self.addresses[name], KEY) as link:
            counts = await worker_pb2_grpc.WorkerStub(link).GetCounts(worker_pb2.GetCountsRequest(), timeout=5.0)
        return dict(counts.live)

    async def refused(self) -> int:
        """Hand-overs that decode workers refused since they started."""
        total = 0
        for name in self.of("decode"):
            async with channel(self.addresses[name], KEY) as link:
                counts = await worker_pb2_grpc.WorkerStub(link).GetCounts(worker_pb2.GetCountsRequest(), timeout=5.0)
            total += counts.load.refused_handoffs
        return total

    async def counts_at_rest(self) -> dict[str, dict[str, int]]:
        """Workers measure their links when they meet: those transfers end by themselves."""
        while _moves(found := await self.counts()):
            await asyncio.sleep(0.02)
        return found

    async def counts(self) -> dict[str, dict[str, int]]:
        return {name: await self.counts_of(name) for name in self.addresses}

    async def assert_as_at_start(self) -> None:
        """Promise P3, of those that lived on as of those that were started again."""
        deadline_s = time.monotonic() + SETTLE_S
        found: dict[str, dict[str, int]] = {}
        while time.monotonic() < deadline_s:
            with contextlib.suppress(grpc.aio.AioRpcError):
                found = await self.counts()
            if found == self.at_start:
                return
            await asyncio.sleep(0.05)
        left = {
            f"{name} {key}": (count, found.get(name, {}).get(key))
            for name, counts in self.at_start.items()
            for key, count in counts.items()
            if count != found.get(name, {}).get(key)
        }
        raise AssertionError(f"at start and now: {left}")


@contextlib.contextmanager
def processes(
    folder: Path,
    redis_url: str,
    engine: Mapping[str, Any],
    *,
    routers: int = 1,
    prefill: int = 2,
    decode: int = 2,
    handoff: Mapping[str, Any] | None = None,
    networks: Networks | None = None,
    drain_s: float = 0.5,
) -> Iterator[Processes]:
    """Workers are in `networks`, where these are given, each in that of its name; routers stay outside."""
    shared: dict[str, Any] = {
        "redis_url": redis_url,
        "cluster_key": KEY,
        "cluster": "test",
        "drain_s": drain_s,
    }
    outside = "127.0.0.1" if networks is None else networks.gateway
    running = Processes(folder)
    try:
        for role, count in (("prefill", prefill), ("decode", decode)):
            for index in range(count):
                name = f"{role}-{index}"
                config = WorkerConfig(
                    role=role,
                    worker_id=name,
                    host=outside if networks is None else networks.addresses[name],
                    port=free_port(outside, 0),
                    engine=EngineConfig(**engine),
                    handoff=HandoffConfig(**(handoff or {})),
                    **shared,
                )
                running.add(name, config, "" if networks is None else networks.namespace(name))
        for index in range(routers):
            name = f"router-{index}"
            running.add(name, RouterConfig(router_id=name, host=outside, port=free_port(outside, 0), **shared))
        yield running
    finally:
        running.close()


def _moves(counts: dict[str, dict[str, int]]) -> bool:
    return any(count for each in counts.values() for key, count in each.items() if key.endswith(".transfers"))
