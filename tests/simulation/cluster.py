"""Processes of the simulated world, composed of the product's parts as worker/serving.py and router/__main__.py do.

Simulated are the engine (model.py), transports, gRPC below the handlers, Redis, and the engine loop's thread: its own
begin_step() and end_step() are called by a task, with the time between them that a step takes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from pydantic import SecretStr

from decode_svc.pool import DecodePool
from kvtransfer.routes import ranks_to_proto, whole_layout
from legato.v1 import inference_pb2_grpc, worker_pb2
from prefill_svc.pool import PrefillPool
from router.constraints import Constraints
from router.inference import InferenceService
from router.line import Line
from router.meter import Meter as RouterMeter
from router.moves import Balancer
from router.placer import Placer
from router.registry import Registry
from scheduler.batch import SchedulerConfig
from scheduler.handoff import HandoffConfig
from scheduler.plan import Slice, StepPlan, StepResult
from service.channel import channel
from service.config import WorkerConfig
from service.messages import identity_text, layout_to_proto
from service.registry import Registrar, Watcher
from service.tracing import Spans
from service.wire import spoken
from telemetry.setup import setup
from tests.simulation.loop import Process, SimulatedLoop
from tests.simulation.model import ADAPTER, EOS, IDENTITY, VOCAB, Engine, Memory, Truth, layout_of
from tests.simulation.network import Network, Server
from tests.simulation.store import Store
from tests.simulation.transport import Fabric, SimulatedTransport
from worker.core import Core
from worker.lanes import LaneReservations, Lanes
from worker.loop import EngineLoop
from worker.meter import Meter
from worker.serving import Pool, add_services
from worker.tiers import HostTier, Tier
from worker.warming import Warming
from worker.watch import StepWatch

KEY = "a key of simulations"
REDIS_URL = "redis://redis"
PORT = 1
TIER_BYTES = 40 * layout_of(4).block_bytes
TELEMETRY = setup("simulated")
CONFIGS = {
    (role, lease_s, digest): WorkerConfig(
        role=role,  # type: ignore[arg-type]
        redis_url=REDIS_URL,
        cluster_key=SecretStr(KEY),
        handoff={"lease_s": lease_s, "digest": digest, "digest_sample": 0.5},  # type: ignore[arg-type]
    )
    for role in ("prefill", "decode")
    for lease_s in (0.5, 1.0, 3.0)
    for digest in ("always", "sampled", "off")
}


@dataclasses.dataclass(slots=True)
class Surroundings:
    """What all processes of a world share."""

    loop: SimulatedLoop
    network: Network
    fabric: Fabric
    store: Store
    truths: dict[str, Truth]  # by request
    violated: Callable[[str], None]
    digest: str  # as handoff.digest
    disks: dict[str, Disk] = dataclasses.field(default_factory=dict)  # by worker; what is there outlives it


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerPlan:
    role: str
    worker_id: str
    num_blocks: int
    block_tokens: int
    cut: str  # of the model over ranks: model.rectangles()
    max_step_tokens: int
    max_sequences: int
    lease_s: float
    step_s: float
    groups: int  # among dp
    tier: str  # where evicted blocks go: "host", which dies with the process, "disk", or nowhere


class Disk(HostTier):
    """A tier whose contents the next life finds."""

    name = "disk"


class Executor:
    """StepExecutor around the simulated engine; a step's KV is there when it is submitted, and again when it ends. The
    first layer of each rank is said to be there at once."""

    steps_out = 1

    def __init__(self, engine: Engine, num_ranks: int, meter: Meter, look: Callable[[StepPlan], None]) -> None:
        self._engine, self._num_ranks, self._meter, self._look = engine, num_ranks, meter, look
        self._out: deque[tuple[tuple[StepPlan, ...], tuple[StepResult, ...], float]] = deque()

    def submit(self, plans: Sequence[StepPlan], watch: StepWatch | None, meanwhile: Callable[[], None]) -> None:
        for plan in plans:
            self._look(plan)
        results = tuple(self._engine.execute(group, plan) for group, plan in enumerate(plans))
        self._out.append((tuple(plans), results, time.monotonic()))
        if watch is not None:
            for rank in range(self._num_ranks):
                if watch.hook(rank) is not None:
                    watch.written(rank, 1)
        meanwhile()

    def prepare(self, slices: tuple[Slice, ...]) -> None:
        """The engine makes its inputs of plans alone."""

    def result(self) -> tuple[StepResult, ...]:
        plans, results, submitted_s = self._out.popleft()
        for group, plan in enumerate(plans):
            self._engine.finish(group, plan)
        self._meter.step(plans, results, time.monotonic() - submitted_s)
        return results

    def totals(self) -> dict[str, int]:
        return {}


class _Work:
    """EngineLoop's condition without threads: wait() says how long, notify() ends that."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop
        self.wait_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_exception: object) -> None:
        pass

    def wait(self, timeout_s: float) -> None:
        self.wait_s = timeout_s

    def notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def waited(self) -> None:
        assert self.wait_s is not None
        self._waiter = self._loop.create_future()
        alarm = self._loop.call_later(self.wait_s, self.notify)
        await self._waiter
        alarm.cancel()
        self._waiter = self.wait_s = None


class _Calls:
    """What the loop's second thread does, in its order."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop

    def put(self, call: Callable[[], object]) -> None:
        self._loop.call_soon(call)


class SteppedLoop(EngineLoop):
    """The engine loop as a task."""

    def run_in(
        self, loop: SimulatedLoop, step_s: Callable[[], float], on_defect: Callable[[BaseException], None]
    ) -> None:
        self._work = cast(Any, _Work(loop))
        self._calls = cast(Any, _Calls(loop))
        self._driving = loop.create_task(self._drive(step_s, on_defect))

    async def _drive(self, step_s: Callable[[], float], on_defect: Callable[[BaseException], None]) -> None:
        work = cast(_Work, self._work)
        try:
            while True:
                while not self._told.is_set():
                    await asyncio.sleep(0)
                if self.begin_step():
                    await asyncio.sleep(step_s())
                    self.end_step()
                elif work.wait_s is not None:
                    await work.waited()
                else:
                    await asyncio.sleep(0)
        except Exception as error:
            on_defect(error)


class Worker:
    """One life of a prefill or decode worker."""

    def __init__(self, plan: WorkerPlan, around: Surroundings) -> None:
        self.plan = plan
        self.process = Process(plan.worker_id)
        self.memory = Memory(plan.num_blocks, plan.block_tokens, plan.cut, plan.groups)
        self.stepping: Callable[[Worker, StepPlan], None] = lambda worker, plan: None
        self.is_up = False  # what follows is there
        self.core: Core
        self.pool: Pool
        self.server: Server
        self._around = around

    async def run(self) -> None:
        """In its process; until that dies."""
        around, loop = self._around, self._around.loop
        self.core = core = self._core()
        pools: dict[str, Any] = {"prefill": PrefillPool, "decode": DecodePool}
        self.pool = pool = pools[self.plan.role](core, Spans(TELEMETRY))
        core.loop = engine_loop = SteppedLoop(
            core.scheduler, core.executor, pool.deliver, self._defect, pool.tick, pool.begin
        )
        self.server = server = Server(around.network, self.process, core.record.address, KEY)
        add_services(cast(Any, server), core, pool, self._drain)
        engine_loop.run_in(loop, self._step_s, self._defect)
        if core.tiers:
            core.warming = Warming(core, core.tiers)
        self._registrar = registrar = Registrar(REDIS_URL, "simulated", core.record)
        self.is_up = True
        async with registrar:
            await loop.create_future()

    async def _drain(self) -> None:
        raise AssertionError("nobody drains it by a call")

    def drain(self) -> None:
        """As worker/serving.py does first when it is asked to stop."""
        self.pool.drain()
        self.core.record.draining = True
        self._registrar.update(self.core.record)

    def _defect(self, error: BaseException) -> None:
        self._around.violated(f"the engine loop of {self.plan.worker_id} failed: {error!r}")

    def _step_s(self) -> float:
        return self._around.network.rng.uniform(0.3, 1.7) * self.plan.step_s

    def _core(self) -> Core:
        plan, around = self.plan, self._around
        transport = SimulatedTransport(around.fabric, self.process)
        region = transport.register(self.memory.buffer.nbytes, self.memory.buffer)
        ranks = tuple(self.memory.ranks)
        record = worker_pb2.WorkerRecord(
            worker_id=plan.worker_id,
            role=worker_pb2.PREFILL if plan.role == "prefill" else worker_pb2.DECODE,
            epoch=around.loop.unix_ns(),
            address=f"{plan.worker_id}:{PORT}",
            identity=IDENTITY,
            kv_layout=layout_to_proto(whole_layout(ranks)),
            ranks=ranks_to_proto(ranks),
            total_blocks=plan.num_blocks * plan.groups,
            max_context_tokens=256,
            max_step_tokens=plan.max_step_tokens,
            endpoints=[
                worker_pb2.TransportEndpoint(name=transport.name, address=transport.address, region=region.descriptor)
            ],
            model_path="simulated",
            vocab_size=VOCAB,
            eos_token_ids=[EOS],
            wire=spoken(),
            adapters=[ADAPTER],
        )
        lanes = Lanes.of(
            [
                SchedulerConfig(
                    num_blocks=plan.num_blocks,
                    block_tokens=plan.block_tokens,
                    max_step_tokens=plan.max_step_tokens,
                    max_sequences=plan.max_sequences,
                    max_context_tokens=256,
                    eos_token_ids=(EOS,),
                    cache_salt=identity_text(IDENTITY).encode(),
                    group=group,
                )
                for group in range(plan.groups)
            ]
        )
        meter = Meter(TELEMETRY)
        nothing = cast(Any, None)
        return Core(
            config=CONFIGS[plan.role, plan.lease_s, around.digest],
            cluster_key=KEY.encode(),
            record=record,
            ranks=ranks,
            engine=nothing,
            grammars=nothing,
            others=None,
            executor=Executor(
                Engine(self.memory, around.truths), len(ranks), meter, lambda plan: self.stepping(self, plan)
            ),
            landings_are_kv=True,
            transports={transport.name: transport},
            regions={transport.name: region},
            scheduler=lanes,
            reservations=LaneReservations(
                lanes,
                lambda group: HandoffConfig(plan.max_sequences, 256, plan.lease_s, group=group),
                consumer=f"{record.worker_id}/{record.epoch:x}",
            ),
            meter=meter,
            digest_pool=nothing,
            tiers=self._tiers(),
        )

    def _tiers(self) -> tuple[Tier, ...]:
        """Of all that it would ever hold."""
        match self.plan.tier:
            case "host":
                return (HostTier(TIER_BYTES),)
            case "disk":
                return (self._around.disks.setdefault(self.plan.worker_id, Disk(TIER_BYTES)),)
        return ()

    def live(self) -> dict[str, int]:
        """What must be zero when nothing runs."""
        if not self.is_up:
            return {"starting": 1}
        counts = self.core.live() | self.pool.live()
        return {name: count for name, count in counts.items() if count and not name.endswith(".regions")}


class _Text:
    """One letter a token."""

    vocab_size = VOCAB
    has_chat_template = False

    def stream(self, *, skip_special: bool = True) -> _Text:
        return self

    def push(self, token_ids: Iterable[int]) -> str:
        return "".join(chr(97 + token_id) for token_id in token_ids)

    def finish(self) -> str:
        return ""


class Router:
    """One life of a router."""

    def __init__(self, router_id: str, decode_prefills_tokens: int, around: Surroundings) -> None:
        self.router_id = router_id
        self.process = Process(router_id)
        self.is_up = False  # what follows is there
        self.registry: Registry
        self.line: Line
        self.inference: InferenceService
        self.server: Server
        self._decode_prefills_tokens = decode_prefills_tokens
        self._around = around

    async def run(self) -> None:
        around = self._around
        self.registry = registry = Registry(
            self.router_id, dial=lambda address: channel(address, KEY), read_tokenizer=lambda path: cast(Any, _Text())
        )
        self.line = Line(64)
        placer = Placer(registry, self.line, self._decode_prefills_tokens)
        self.inference = InferenceService(
            registry, placer, Constraints(), RouterMeter(TELEMETRY), Spans(TELEMETRY), 20.0
        )
        self.server = server = Server(around.network, self.process, f"{self.router_id}:{PORT}", KEY)
        server.add(
            inference_pb2_grpc.add_InferenceServicer_to_server, self.inference, "legato.v1.Inference", internal=False
        )
        async with Watcher(REDIS_URL, "simulated") as watcher:
            registry.spawn(registry.follow(watcher.snapshots()), name="follow the registry")
            registry.spawn(Balancer(registry).run(), name="balance")
            self.is_up = True
            await around.loop.create_future()

    def live(self) -> dict[str, int]:
        """What must be zero when nothing runs."""
        if not self.is_up:
            return {"starting": 1}
        workers = self.registry.workers.values()
        counts = {
            "running requests": self.inference.meter.running_requests,
            "in line": len(self.line),
            "tasks": self.registry.tasks - 2,  # that which follows the registry, and that which balances
            "charged tokens": sum(worker.charged_tokens for worker in workers),
            "charges": sum(worker.requests for worker in workers),
            "routes": sum(worker.routes for worker in workers),
        }
        return {name: count for name, count in counts.items() if count}
