"""A whole cluster as child processes: Redis, router, workers. Starts them, restarts what dies, stops all.

start()        checks port and Redis, then starts every process at once
wait_ready()   until the router says SERVING and every worker is ready; raises what keeps it from there
failed         a future: what ended the cluster by itself, while it served
stop()         SIGTERM, then SIGKILL; within STOP_S. Files that hold the cluster's key or a password go with it
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from legato import AsyncClient, Retries
from legato.command.local import valkey
from legato.command.local.child import Child
from legato.errors import LegatoError as ClientError
from service.config import ClusterConfig, RouterConfig, Section, WorkerConfig, save, without_overrides
from service.ports import free_port
from service.registry import check_redis
from spec.errors import InternalError, InvalidConfiguration, SetupError

STOP_S = 7.5  # all of it, the last kill included, stays under 10
DRAIN_S = 4.0  # a part of it is left for closing down
POLL_S = 0.2
REDIS_ANSWERS_S = 5.0
WAIT_IS_TOLD_S = 5.0  # a router that does not serve so long after every worker is ready is kept from it by something
FIRST_DELAY_S, MAX_DELAY_S = 0.5, 10.0
STABLE_S = 30.0  # who was ready for so long starts its delays anew
MAX_FAILED_RESTARTS = 5  # in succession, without having been ready between


@dataclasses.dataclass(frozen=True, slots=True)
class _Wait:
    """For the router alone: since when, and the reason that was told last."""

    since_s: float = dataclasses.field(default_factory=time.monotonic)
    reason: str = ""


class LocalCluster:
    """`on_change(child)` is called when a child's state changes, `on_wait(words)` when something keeps the cluster from
    serving that no state shows. Files lie in `folder`; logs outlive the cluster."""

    def __init__(
        self,
        config: ClusterConfig,
        folder: Path,
        environment: Mapping[str, str],
        on_change: Callable[[Child], None] = lambda child: None,
        on_wait: Callable[[str], None] = lambda words: None,
    ) -> None:
        self.folder = folder
        self.children: list[Child] = []
        self.workers: list[Child] = []
        self.failed: asyncio.Future[SetupError | InternalError] = asyncio.get_running_loop().create_future()
        self._config = config
        self._environment = child_environment(environment, config)
        self._on_change = on_change
        self._on_wait = on_wait
        self._tasks: list[asyncio.Task[None]] = []
        self._is_stopping = False
        self._router: Child | None = None
        self._redis: Child | None = None
        self._secrets: list[Path] = []  # files of ours

    @property
    def address(self) -> str:
        """HOST:PORT by which a client of this machine reaches the router."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self._config.host, self._config.host)
        return f"{host}:{self._config.port}"

    async def start(self) -> None:
        """Raises InvalidConfiguration when the port is taken or Redis does not answer; nothing runs then."""
        self._config = self._config.model_copy(
            update={
                "port": free_port(self._config.host, self._config.port),
                "drain_s": min(self._config.drain_s, DRAIN_S),
            }
        )
        try:
            resolved = self._config.resolve(await self._redis_url())
            self._config = resolved
            self._router = self._add("router", resolved.router())
            self.workers = [self._add(f"{worker.role}_svc", worker) for worker in resolved.workers()]
            await asyncio.gather(*(self._start(child) for child in (self._router, *self.workers)))
        except BaseException:
            await self.stop()
            raise
        self._tasks.append(asyncio.create_task(self._watch_readiness()))

    async def wait_ready(self) -> None:
        """Until the router and every worker serve. Raises what keeps them from it, with the log line that says why."""
        assert self._router is not None, "start() comes first"
        ready = asyncio.create_task(_all_ready([self._router, *self.workers]))
        try:
            await first_of(ready, self.failed)
        finally:
            ready.cancel()
        if self.failed.done():
            raise self.failed.result()

    async def stop(self) -> None:
        """Idempotent. Redis goes last, so that workers can take their registration back."""
        self._is_stopping = True
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            deadline_s = time.monotonic() + STOP_S
            await self._stop([child for child in self.children if child is not self._redis], deadline_s - 0.5)
            await self._stop([self._redis] if self._redis is not None else [], deadline_s)
        finally:
            for path in self._secrets:
                path.unlink(missing_ok=True)

    def kill(self) -> None:
        """At once, without grace."""
        for child in self.children:
            child.kill()

    async def _redis_url(self) -> str:
        if self._config.redis_url is not None:
            await check_redis(self._config.redis_url)
            return self._config.redis_url
        port = free_port()
        self._secrets.append(self.folder / valkey.CONFIGURATION)
        command, url = valkey.prepare(port, self.folder)
        self._redis = self._child("redis", command)
        self._config = self._config.model_copy(update={"redis_url": url})
        await self._start(self._redis)
        if not await self._redis_answers(self._redis):
            raise InvalidConfiguration(
                f"the embedded Redis server did not start: {' '.join(self._redis.last_lines(3))}"
            )
        return url

    async def _redis_answers(self, child: Child) -> bool:
        """Whether the embedded server came up. One that runs and does not answer is ended."""
        assert self._config.redis_url is not None, "_redis_url() comes first"
        deadline_s = time.monotonic() + REDIS_ANSWERS_S
        while child.is_running and time.monotonic() < deadline_s:
            with contextlib.suppress(InvalidConfiguration):
                await check_redis(self._config.redis_url)
                child.mark_ready(self._config.redis_url.rpartition("@")[2].partition("/")[0])
                self._on_change(child)
                return True
            await asyncio.sleep(0.1)
        child.kill()
        return False

    def _add(self, module: str, config: WorkerConfig | RouterConfig) -> Child:
        name = config.worker_id if isinstance(config, WorkerConfig) else config.router_id
        assert name is not None, "ClusterConfig names every process"
        path = self._write(name, config)
        return self._child(name, [sys.executable, "-m", module, "--config", str(path), "--exit-with-stdin"])

    def _write(self, name: str, config: Section) -> Path:
        path = self.folder / f"{name}.yaml"
        self._secrets.append(path)
        save(config, path)
        return path

    def _child(self, name: str, command: list[str]) -> Child:
        child = Child(name, command, self.folder / f"{name}.log", self._environment)
        self.children.append(child)
        return child

    async def _start(self, child: Child) -> None:
        await child.start()
        self._on_change(child)
        self._tasks.append(asyncio.create_task(self._supervise(child)))

    async def _supervise(self, child: Child) -> None:
        """Restarts it for as long as it can be hoped to come up."""
        failures = 0
        while True:
            code = await child.wait()
            if self._is_stopping:
                return
            served_s = time.monotonic() - child.started_s if child.ready.is_set() else 0.0
            failures = 0 if served_s > STABLE_S else failures + (not child.ready.is_set())
            child.ready.clear()
            if not child.was_ready or failures > MAX_FAILED_RESTARTS:
                child.state = "ended"
                self._on_change(child)
                self._fail(child, code)
                return
            child.state = "restarting"
            child.restarts += 1
            self._on_change(child)
            await asyncio.sleep(min(MAX_DELAY_S, FIRST_DELAY_S * 2**failures))
            await child.start()
            self._on_change(child)
            if child is self._redis:
                await self._redis_answers(child)

    def _fail(self, child: Child, code: int) -> None:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        lines = child.last_lines(12)
        said = next(
            (line for line in reversed(lines) if line.startswith("legato: ")), lines[-1] if lines else "no word"
        )
        message = f"{child.name} could not start ({how}): {said.removeprefix('legato: ')}; its log is {child.log_path}"
        kind = InvalidConfiguration if code == os.EX_CONFIG else InternalError
        if not self.failed.done():
            self.failed.set_result(kind(message))

    async def _watch_readiness(self) -> None:
        """The router's health and its own view of the workers are the truth about who is ready."""
        assert self._router is not None
        keys = self._config.api_keys
        key = keys[0].get_secret_value() if keys else None
        async with AsyncClient(self.address, timeout_s=2.0, api_key=key, retries=Retries(attempts=1)) as client:
            wait = _Wait()
            while True:
                with contextlib.suppress(ClientError):
                    view = await client.cluster()
                    known = {worker.pid: worker for worker in view.workers if worker.state == "ready"}
                    for child in self.workers:
                        if child.state == "starting" and child.pid in known:
                            child.mark_ready(known[child.pid].address)
                            self._on_change(child)
                    if self._router.state == "starting" and await is_serving(self.address):
                        self._router.mark_ready(self.address)
                        self._on_change(self._router)
                wait = self._wait_of_router(wait)
                await asyncio.sleep(POLL_S)

    def _wait_of_router(self, wait: _Wait) -> _Wait:
        """Tells, once for each reason, what keeps the router from serving though every worker is ready."""
        assert self._router is not None
        if self._router.ready.is_set() or not all(worker.ready.is_set() for worker in self.workers):
            return _Wait()
        if time.monotonic() - wait.since_s < WAIT_IS_TOLD_S:
            return wait
        reason = self._router.last_warning() or f"its log is {self._router.log_path}"
        if reason != wait.reason:
            self._on_wait(f"still waiting for {self._router.name}, though every worker is ready: {reason}")
        return _Wait(wait.since_s, reason)

    async def _stop(self, children: list[Child], deadline_s: float) -> None:
        running = [child for child in children if child.is_running]
        ended = [child for child in children if child.pid and not child.is_running]
        await asyncio.gather(*(child.wait() for child in ended))
        for child in running:
            child.ask_to_stop()
            self._on_change(child)
        if running:
            ends = [asyncio.ensure_future(self._ended(child)) for child in running]
            await asyncio.wait(ends, timeout=max(0.1, deadline_s - time.monotonic()))
            for child in running:
                child.kill()
            await asyncio.gather(*ends)

    async def _ended(self, child: Child) -> None:
        await child.wait()
        child.state = "ended"
        self._on_change(child)


async def _all_ready(children: list[Child]) -> None:
    for child in children:
        await child.ready.wait()


async def first_of(*futures: asyncio.Future[Any]) -> None:
    """Until one of them is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


async def is_serving(address: str) -> bool:
    """The standard gRPC health check of legato.v1.Inference."""
    import grpc.aio
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            request = health_pb2.HealthCheckRequest(service="legato.v1.Inference")
            reply = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=1.0)
        except grpc.aio.AioRpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def child_environment(environment: Mapping[str, str], config: ClusterConfig) -> dict[str, str]:
    """Several processes share few cores: each gets its part, and its idle threads sleep instead of spinning.

    Prefill and decode seldom compute at the same moment for one request, so the part is of the larger pool's."""
    shared = without_overrides(environment)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, cores // max(config.prefill, config.decode))
    defaults = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    return defaults | shared
