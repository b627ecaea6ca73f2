"""A worker's life as a process: listen, load, register, serve, drain, end.

the port is taken first         a port that is taken is found before a model is loaded
then model, memory, engine      minutes for a large model; health says NOT_SERVING, `report` how far it is
then the registration           routers find it
asked to stop: drain            the registration says so, nothing new is admitted, what runs moves away, ends, or its
                                time is up
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from legato.v1 import worker_pb2, worker_pb2_grpc
from scheduler.events import Event
from scheduler.plan import StepPlan
from service import logs
from service.config import WorkerConfig
from service.host import Host
from service.registry import Registrar, check_redis
from service.run import EXIT_CONFIGURATION, arguments, run_service, say
from service.tracing import Spans
from spec.errors import InternalError, InvalidConfiguration, WorkerLost
from telemetry.setup import setup
from worker.build import build_core
from worker.control import WorkerService
from worker.core import Core
from worker.handoffs import Handoffs
from worker.loop import EngineLoop
from worker.prefix_sends import PrefixSends
from worker.rank import run_rank
from worker.rank_setup import Place, layout_of, place_from
from worker.warming import Warming
from worker.watch import StepWatch

logger = logs.get(__name__)

POLL_S = 0.02


class Pool(Protocol):
    """What makes a worker a prefill or a decode worker."""

    service_name: str
    handoffs: Handoffs
    prefix_sends: PrefixSends

    def add_to(self, host: Host) -> None: ...
    def deliver(self, events: Sequence[Event]) -> None: ...
    def begin(self, plans: Sequence[StepPlan]) -> StepWatch | None: ...
    def tick(self, now_s: float) -> float | None: ...
    def live(self) -> dict[str, int]: ...
    def links(self) -> list[worker_pb2.PeerLink]: ...
    def drain(self) -> None:
        """Refuse new work from now on."""

    async def confirm_quiet(self, reservation_id: str) -> None:
        """Returns when nothing of that reservation is, or ever will be, in flight from here."""

    async def close(self) -> None: ...


@dataclasses.dataclass(slots=True)
class Running:
    core: Core
    pool: Pool
    failed: asyncio.Future[object]  # with the exception: the engine loop ended; nothing more is served


Report = Callable[[str, float], None]
MakePool = Callable[[Core, Spans], Pool]


def log_progress(what: str, fraction: float) -> None:
    logger.info("state=loading step=%r percent=%d", what, int(fraction * 100))


@contextlib.asynccontextmanager
async def running(
    config: WorkerConfig, make_pool: MakePool, report: Report = log_progress, place: Place | None = None
) -> AsyncIterator[Running]:
    """Serves while the block runs. Raises the SetupErrors of what it was given, WorkerLost when a rank dies meanwhile.
    `place`: of rank 0, where a launcher started this process."""
    event_loop = asyncio.get_running_loop()
    telemetry = setup(
        config.telemetry.service_name or f"legato-{config.role}", config.telemetry.otlp_endpoint, config.worker_id or ""
    )
    await check_redis(config.redis_url)
    async with Host(config.host, config.port, internal_key=config.cluster_key, drain_s=1.0) as host:
        core = await asyncio.to_thread(build_core, config, telemetry, report, place)
        failed: asyncio.Future[object] = event_loop.create_future()

        def fail(error: BaseException) -> None:
            host.set_serving(pool.service_name, False)
            if not failed.done():
                failed.set_result(error)

        def on_failure(error: BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the event loop has ended: so has all that could fail
                event_loop.call_soon_threadsafe(fail, error)

        core.record.address = _advertised(config.advertise, host)
        pool = make_pool(core, Spans(telemetry))
        core.loop = EngineLoop(
            core.scheduler,
            core.executor,
            pool.deliver,
            on_failure=on_failure,
            tick=pool.tick,
            begin=pool.begin,
        )
        if core.tiers:
            core.warming = Warming(core, core.tiers)
        registrar = Registrar(config.redis_url, config.cluster, core.record, config.registration_lease_s)

        async def drain() -> None:
            await _drain(host, core, pool, registrar)

        add_services(host, core, pool, drain)
        core.loop.start()
        if core.others is not None:
            core.others.on_lost = on_failure
            if core.others.lost is not None:  # before anybody listened
                on_failure(core.others.lost)
        try:
            async with registrar:
                host.set_serving(pool.service_name, True)
                host.set_serving("legato.v1.Worker", True)
                logger.info("state=ready worker=%s address=%s", core.record.worker_id, core.record.address)
                yield Running(core, pool, failed)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(config.drain_s):
                        await drain()
        finally:
            await pool.close()
            await host.stop()
            if core.warming is not None:
                await core.warming.close()
            await asyncio.to_thread(core.close)
            telemetry.close()


def add_services(host: Host, core: Core, pool: Pool, drain: Callable[[], Awaitable[None]]) -> None:
    """The pool's own, and what every worker has."""
    pool.add_to(host)
    control = WorkerService(core, pool.live, pool.links, drain, pool.confirm_quiet, pool.handoffs, pool.prefix_sends)
    host.add(worker_pb2_grpc.add_WorkerServicer_to_server, control, "legato.v1.Worker", internal=True)


def main_of(description: str, role: str, make_pool: MakePool, environment: Mapping[str, str]) -> int:
    """A worker's process, from its command line to its exit code (service/run.py); also one of the other ranks, where a
    launcher starts them all."""
    config, exit_with_stdin = arguments(description, WorkerConfig, {**environment, "LEGATO_ROLE": role})
    try:
        place = place_from(environment, layout_of(config))
    except InvalidConfiguration as error:
        say(error)
        return EXIT_CONFIGURATION
    if place.rank > 0:
        return run_rank(config, place)
    return run_service(lambda stop: serve(config, stop, make_pool, place), exit_with_stdin=exit_with_stdin)


async def serve(config: WorkerConfig, stop: asyncio.Event, make_pool: MakePool, place: Place | None = None) -> None:
    """Until `stop`. Raises WorkerLost when a rank dies, InternalError when the engine loop fails otherwise."""
    logs.setup(config.worker_id or f"legato-{config.role}", config.telemetry.log_level)
    async with running(config, make_pool, place=place) as worker:
        stopping: asyncio.Future[object] = asyncio.ensure_future(stop.wait())
        await asyncio.wait({stopping, worker.failed}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if worker.failed.done():
            failure = worker.failed.result()
            raise failure if isinstance(failure, WorkerLost) else InternalError(f"the engine loop failed: {failure!r}")


async def _drain(host: Host, core: Core, pool: Pool, registrar: Registrar) -> None:
    """Routers are told, nothing new is admitted; returns when what runs has ended."""
    host.set_serving(pool.service_name, False)
    pool.drain()
    core.record.draining = True
    registrar.update(core.record)
    while any(pool.live().values()):
        await asyncio.sleep(POLL_S)


def _advertised(advertise: str | None, host: Host) -> str:
    if advertise is None:
        return host.address
    has_port = advertise.count(":") == 1 or "]:" in advertise
    return advertise if has_port else f"{advertise}:{host.port}"
