"""A seed, played to its end, and what must be true of it.

at any time    no write is posted or lands but in memory that is reserved for it; no step reads KV that is not its own
every request  tokens once, in order, the right ones; whole, or a typed error, within its deadline
at rest        nothing is held, counted or running but what was at start; what prefix caches hold is what they say
after that     the cluster serves
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import gc
import hashlib
import logging
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any
from unittest import mock

import grpc

import decode_svc.pool
import legato
import prefill_svc.pool
import service.registry
from legato import errors
from tests.simulation import schedule as kinds
from tests.simulation.cluster import PORT, Router, Surroundings, Worker, WorkerPlan
from tests.simulation.faults import Faults
from tests.simulation.loop import MONOTONIC_AT_START_S, Process, SimulatedLoop, as_the_only_clock
from tests.simulation.model import Truth, truth_of
from tests.simulation.network import Network
from tests.simulation.schedule import RequestPlan, Schedule, schedule_of
from tests.simulation.store import Store
from tests.simulation.transport import Fabric
from tests.simulation.witness import Witness

SLACK_S = 1.0  # after its deadline, until a request must have ended
START_S = 5.0  # until all are linked
REST_S = 90.0  # after the last request, until nothing is held any more
LAST_REQUEST_S = 25.0

PHASES = ("placed", "reserved", "prefilling", "moving", "handed over", "decoding", "finishing")


class Violation(AssertionError):
    """A promise was broken. Names the seed, which replays it."""


class Hopeless(Exception):
    """What was waited for does not come; it is noted."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a seed came to; equal for equal seeds."""

    seed: int
    ends: collections.Counter[str]  # of requests: "finished", or the error's reason
    hits: collections.Counter[tuple[str, str]]  # (fault, phase): requests that it found in that phase
    refused: collections.Counter[str]  # hand-overs, by reason
    done: collections.Counter[str]  # what workers and routers counted of what they did
    callbacks: int
    lasted_s: float
    fingerprint: str


@dataclasses.dataclass(slots=True)
class Client:
    plan: RequestPlan
    truth: Truth
    process: Process
    task: asyncio.Task[None] | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    end: str = ""


class World:
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        rng = random.Random(schedule.seed + 1)
        self.loop = loop = SimulatedLoop(rng)
        network = Network(loop, rng)
        network.latency_s = schedule.latency_s
        fabric = Fabric(network, rng)
        fabric.is_digested = schedule.digest == "always"
        self.around = Surroundings(loop, network, fabric, Store(loop, network), {}, self.violated, schedule.digest)
        self.rng = rng
        self.violations: list[str] = []
        self.is_over = False
        self.workers: dict[str, Worker] = {}
        self.routers: dict[str, Router] = {}
        self.clients: dict[str, Client] = {}
        self.hits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.done: collections.Counter[str] = collections.Counter()
        self.witness = Witness(self)
        self.around.fabric.posting, self.around.fabric.landing = self.witness.posting, self.witness.landing

    def violated(self, what: str) -> None:
        if not self.is_over:
            self.violations.append(f"at {self.loop.now_s - MONOTONIC_AT_START_S:.3f} s: {what}")

    # ---- the course of things --------------------------------------------------------------------------------------

    async def run(self) -> None:
        try:
            for plan in self.schedule.workers:
                self.start_worker(plan)
            for router_id in self.schedule.routers:
                self.start_router(router_id)
            await self.until(self.is_linked, START_S, "the cluster does not come up")
            begun_s = self.loop.time()
            for plan in self.schedule.requests:
                self.loop.call_at(begun_s + plan.at_s, self.ask, plan)
            strikes = Faults(self, begun_s)
            faults = [asyncio.ensure_future(strikes.strike(fault)) for fault in self.schedule.faults]
            await asyncio.gather(*faults)
            last_s = max(plan.at_s for plan in self.schedule.requests)
            await asyncio.sleep(begun_s + last_s - self.loop.time())
            await self._settle()
        except Hopeless:
            pass

    async def _settle(self) -> None:
        """Everything is well again; now all must end."""
        for client in list(self.clients.values()):
            left_s = client.plan.timeout_s + SLACK_S
            await self.until(lambda client=client: bool(client.end), left_s, f"{client.plan.name} hangs")  # type: ignore[misc]
        await self.until(lambda: not self.left(), REST_S, lambda: f"it does not come to rest: {self.left()}")
        for router_id in self.schedule.routers:
            plan = RequestPlan(f"last{router_id}".replace("-", ""), 0.0, (1, 2, 3, 4, 5), 7, 4, LAST_REQUEST_S)
            client = self.ask(plan, [router_id])
            await self.until(lambda client=client: bool(client.end), LAST_REQUEST_S + SLACK_S, "the last one hangs")  # type: ignore[misc]
            if client.end != "finished":
                self.violated(f"after all is well again {router_id} does not serve: {client.end}")
        await self.until(lambda: not self.left(), REST_S, lambda: f"it does not come to rest again: {self.left()}")
        for worker in self.workers.values():
            self.witness.audit(worker)

    async def until(self, true: Callable[[], bool], within_s: float, otherwise: str | Callable[[], str]) -> None:
        """Looks ever more rarely. Raises Hopeless."""
        until_s, wait_s = self.loop.time() + within_s, 0.02
        while not true():
            if self.loop.time() > until_s:
                self.violated(otherwise if isinstance(otherwise, str) else otherwise())
                raise Hopeless
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.3, 0.5)

    def start_worker(self, plan: WorkerPlan) -> None:
        worker = self.workers[plan.worker_id] = Worker(plan, self.around)
        worker.stepping = self.witness.stepping
        self._start(worker.process, worker.run())
        self.loop.call_soon(self.witness.note, worker)

    def start_router(self, router_id: str) -> None:
        router = Router(router_id, self.schedule.decode_prefills_tokens, self.around)
        self.routers[router_id] = router
        self._start(router.process, router.run())

    def _start(self, process: Process, life: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            if not self.is_over:
                self.violated(f"{process.name} ended by itself: {task.exception()!r}")

        self.loop.spawn(process, life, name=process.name).add_done_callback(ended)

    def is_linked(self) -> bool:
        return all(
            router.is_up
            and len(router.registry.workers) == len(self.workers)
            and all(worker.linked for worker in router.registry.workers.values())
            and bool(router.registry.models())
            for router in self.routers.values()
        )

    def is_idle(self) -> bool:
        """All have asked and have their end, and nothing is held for them any more."""
        asked = self.clients.values()
        return len(asked) == len(self.schedule.requests) and all(one.end for one in asked) and not self.left()

    def process(self, name: str) -> Process:
        return self.workers[name].process if name in self.workers else self.routers[name].process

    def left(self) -> dict[str, dict[str, int]]:
        found = {name: part.live() for name, part in (*self.workers.items(), *self.routers.items())}
        found["calls"] = dict(
            collections.Counter(
                f"{call.method} {call.client.name}>{call.server_host}"
                for call in self.around.network.calls
                if call.method not in ("Subscribe", "GetCounts", "Describe")
            )
        )
        return {name: counts for name, counts in found.items() if counts}

    # ---- clients ---------------------------------------------------------------------------------------------------

    def ask(self, plan: RequestPlan, routers: Sequence[str] = ()) -> Client:
        truth = self.around.truths[plan.name] = truth_of(plan.prompt, plan.seed, plan.max_tokens, plan.adapter)
        client = self.clients[plan.name] = Client(plan, truth, Process(f"client-{plan.name}"))
        names = list(routers or self.rng.sample(self.schedule.routers, len(self.schedule.routers)))
        address = ",".join(f"{name}:{PORT}" for name in names)
        client.task = self.loop.spawn(client.process, self._follow(client, address), name=plan.name)
        return client

    async def _follow(self, client: Client, address: str) -> None:
        plan, begun_s = client.plan, self.loop.time()
        end = "left"
        try:
            async with legato.AsyncClient(address, timeout_s=plan.timeout_s) as sdk:
                stream = sdk.stream(
                    list(plan.prompt),
                    request_id=plan.name,
                    max_tokens=plan.max_tokens,
                    seed=plan.seed,
                    adapter=plan.adapter,
                )
                async for piece in stream:
                    self._received(client, piece)
                end = "finished"
                if client.tokens != list(client.truth.answer):
                    self.violated(f"{plan.name} ended after {client.tokens}, of {client.truth.answer}")
        except errors.LegatoError as error:
            end = error.reason
            if end == "INTERNAL":
                self.violated(f"{plan.name} ended with a defect: {error}")
        finally:
            took_s = self.loop.time() - begun_s
            if took_s > plan.timeout_s + SLACK_S:
                self.violated(f"{plan.name} took {took_s:.1f} s of {plan.timeout_s} s")
            client.end = end

    def _received(self, client: Client, piece: Any) -> None:
        index = len(client.tokens)
        if piece.token_ids and piece.index != index:
            self.violated(f"{client.plan.name} got index {piece.index} behind {index} tokens")
        client.tokens += piece.token_ids
        if tuple(client.tokens) != client.truth.answer[: len(client.tokens)]:
            self.violated(f"{client.plan.name} got {client.tokens}, which begins no {client.truth.answer}")


class _Errors(logging.Handler):
    """What the product logs as an error is a defect of it."""

    def __init__(self, violated: Callable[[str], None]) -> None:
        super().__init__(logging.ERROR)
        self._violated = violated

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        self._violated(f"an error was logged: {text}")


@contextlib.contextmanager
def _replaced(world: World) -> Iterator[None]:
    product = logging.getLogger("legato")
    handler = _Errors(world.violated)
    level = product.level
    product.addHandler(handler)
    if product.level > logging.WARNING or product.level == logging.NOTSET:
        product.setLevel(logging.ERROR)
    collecting = gc.isenabled()
    gc.disable()  # so that nothing ends at a moment that the seed does not choose
    try:
        with (
            as_the_only_clock(world.loop, world.rng),
            mock.patch.object(grpc.aio, "insecure_channel", world.around.network.channel),
            mock.patch.object(service.registry, "connect", world.around.store.client),
            mock.patch.object(decode_svc.pool, "connect", world.around.store.client),
            mock.patch.object(prefill_svc.pool, "connect", world.around.store.client),
        ):
            yield
    finally:
        product.setLevel(level)
        product.removeHandler(handler)
        if collecting:
            gc.enable()


def play(seed: int, faults: Sequence[str] = kinds.KINDS) -> Outcome:
    """`faults`: the kinds to draw from. Raises Violation."""
    world = World(schedule_of(seed, faults))
    loop = world.loop
    loop.failed = lambda message, error: world.violated(f"{message}: {error!r}")

    async def life() -> list[BaseException]:
        try:
            await world.run()
        finally:
            world.is_over = True
            unseen = await loop.bury()
        return unseen

    with _replaced(world):
        unseen = loop.run_until_complete(life())
    for error in unseen:
        if not isinstance(error, errors.LegatoError | grpc.aio.AioRpcError | asyncio.CancelledError):
            world.violated(f"a task failed: {error!r}")
    world.violations += world.around.network.defects
    if world.violations:
        raise Violation(f"seed {seed}: " + "\n  ".join(world.violations[:8]))
    ends = collections.Counter(client.end for client in world.clients.values())
    story = repr([(client.plan.name, client.end, client.tokens) for client in world.clients.values()])
    said = f"{story} {loop.callbacks} {loop.now_s!r} {world.around.fabric.writes} {sorted(world.refused.items())}"
    fingerprint = hashlib.blake2b(said.encode(), digest_size=8).hexdigest()
    return Outcome(
        seed=seed,
        ends=ends,
        hits=world.hits,
        refused=world.refused,
        done=world.done,
        callbacks=loop.callbacks,
        lasted_s=loop.now_s - MONOTONIC_AT_START_S,
        fingerprint=fingerprint,
    )
