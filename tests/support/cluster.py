"""A whole cluster in this process: the real router, workers, gRPC, Redis and transports, each on its own port.

Everything runs as in production but for the process border; tests/e2e/test_processes.py has that.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

import legato
from decode_svc.pool import DecodePool
from kvtransfer.sockets import SocketsTransport
from legato.v1 import worker_pb2, worker_pb2_grpc
from prefill_svc.pool import PrefillPool
from router.__main__ import serve as serve_router
from service.channel import channel
from service.config import EngineConfig, HandoffConfig, KVTiersConfig, RouterConfig, TelemetryConfig, WorkerConfig
from worker.serving import Running, running

KEY = "a key for tests"
SETTLE_S = 10.0


@contextlib.contextmanager
def links_to(reservation: worker_pb2.Reservation) -> Iterator[Callable[[], int]]:
    """What opens a link by sockets into the memory that was reserved, as a writer does before it begins: its id."""
    endpoint = next(endpoint for endpoint in reservation.endpoints if endpoint.name == "sockets")
    writer = SocketsTransport()
    try:
        yield lambda: writer.connect(endpoint.address, endpoint.region).link_id
    finally:
        writer.close()


@dataclasses.dataclass
class Cluster:
    client: legato.AsyncClient
    address: str
    workers: dict[str, Running]
    at_start: dict[str, dict[str, int]]

    async def counts(self) -> dict[str, dict[str, int]]:
        """What every process counts as live, by name."""
        found = {}
        for name, address in self._addresses().items():
            async with channel(address, KEY) as link:
                counts = await worker_pb2_grpc.WorkerStub(link).GetCounts(worker_pb2.GetCountsRequest())
                found[name] = dict(counts.live)
        return found

    async def counts_at_rest(self) -> dict[str, dict[str, int]]:
        """When workers have met: they measure their links then, and those transfers end by themselves."""
        deadline_s = asyncio.get_running_loop().time() + SETTLE_S
        decode = sum(
            name.startswith("decode") and bool(worker.core.record.endpoints) for name, worker in self.workers.items()
        )
        for name, worker in self.workers.items():
            while name.startswith("prefill") and len({link.worker_id for link in worker.pool.links()}) < decode:
                assert asyncio.get_running_loop().time() < deadline_s, f"{name} has not met all decode workers"
                await asyncio.sleep(0.02)
        while _moves(found := await self.counts()):
            await asyncio.sleep(0.02)
        return found

    async def total(self, pool: str, name: str) -> int:
        """Of all workers of a pool together; what only grows."""
        found = 0
        for worker_id, worker in self.workers.items():
            if worker_id.startswith(pool):
                found += worker.core.scheduler.totals()[name]
        return found

    async def assert_as_at_start(self) -> None:
        """Promise P3. What was given up a moment ago has SETTLE_S to be released."""
        deadline_s = asyncio.get_running_loop().time() + SETTLE_S
        while (found := await self.counts()) != self.at_start and asyncio.get_running_loop().time() < deadline_s:
            await asyncio.sleep(0.05)
        left = {
            name: {
                key: (self.at_start[name][key], count)
                for key, count in counts.items()
                if count != self.at_start[name][key]
            }
            for name, counts in found.items()
        }
        for worker in self.workers.values():
            worker.core.check()
        assert found == self.at_start, f"at start and now: {left}"

    def _addresses(self) -> dict[str, str]:
        return {"router": self.address} | {name: worker.core.record.address for name, worker in self.workers.items()}


@contextlib.asynccontextmanager
async def cluster(
    model: Path,
    redis_url: str,
    *,
    prefill: int = 1,
    decode: int = 1,
    engine: Mapping[str, Any] | None = None,
    prefill_engine: Mapping[str, Any] | None = None,
    decode_engine: Mapping[str, Any] | None = None,
    handoff: Mapping[str, Any] | None = None,
    decode_handoff: Mapping[str, Any] | None = None,
    kv_tiers: Mapping[str, Any] | None = None,
    telemetry: Mapping[str, Any] | None = None,
    router: Mapping[str, Any] | None = None,
) -> AsyncIterator[Cluster]:
    """Engine options are those of EngineConfig, and `num_blocks` for the size of the KV memory."""
    shared = {
        "redis_url": redis_url,
        "cluster_key": KEY,
        "cluster": "test",
        "telemetry": TelemetryConfig(**(telemetry or {})),
    }
    workers: dict[str, Running] = {}
    async with contextlib.AsyncExitStack() as stack:
        for role, count, own, own_handoff, pool in (
            ("prefill", prefill, prefill_engine, None, PrefillPool),
            ("decode", decode, decode_engine, decode_handoff, DecodePool),
        ):
            for index in range(count):
                config = WorkerConfig(
                    role=role,
                    worker_id=f"{role}-{index}",
                    engine=_engine(model, {**(engine or {}), **(own or {})}),
                    handoff=HandoffConfig(**{**(handoff or {}), **(own_handoff or {})}),
                    kv_tiers=KVTiersConfig(**(kv_tiers or {})),
                    drain_s=0.5,
                    **shared,
                )
                workers[f"{role}-{index}"] = await stack.enter_async_context(running(config, pool))
        address = await stack.enter_async_context(
            _router(RouterConfig(port=_free_port(), drain_s=0.5, **shared, **(router or {})))
        )
        client = await stack.enter_async_context(legato.AsyncClient(address))
        made = Cluster(client, address, workers, {})
        made.at_start = await made.counts_at_rest()
        yield made


@contextlib.asynccontextmanager
async def _router(config: RouterConfig) -> AsyncIterator[str]:
    stop = asyncio.Event()
    address = f"{config.host}:{config.port}"
    task = asyncio.create_task(serve_router(config, stop))
    try:
        await _serving(address, task)
        yield address
    finally:
        stop.set()
        await task


async def _serving(address: str, task: asyncio.Task[None]) -> None:
    request = health_pb2.HealthCheckRequest(service="legato.v1.Inference")
    async with channel(address) as link:
        stub = health_pb2_grpc.HealthStub(link)
        while True:
            if task.done():
                task.result()
            with contextlib.suppress(Exception):
                answer = await stub.Check(request, timeout=1.0)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(0.02)


def _engine(model: Path, options: dict[str, Any]) -> EngineConfig:
    if (num_blocks := options.pop("num_blocks", 256)) is not None:
        config = json.loads((model / "config.json").read_text())
        block_tokens = options.get("block_tokens", 16)
        run = config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * block_tokens
        options["kv_memory"] = num_blocks * run * (4 if options.get("dtype", "float32") == "float32" else 2)
    return EngineConfig(**{"model": str(model), "dtype": "float32", "device": "cpu", "threads": 1, **options})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def two_free_ports() -> int:
    """The first of two that follow each other."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


def _moves(counts: dict[str, dict[str, int]]) -> bool:
    return any(count for each in counts.values() for key, count in each.items() if key.endswith(".transfers"))
