"""One worker's working parts, composed: model, KV memory, transports, engine, scheduler, loop.

transports ──allocate──▶ KV memory ──▶ engine ◀──execute── loop ──plan, commit──▶ scheduler ◀──blocks── reservations
     ▲                      │                                                       (decode only)
     └── peers write ───────┘
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from engine.engine import Engine, EngineOptions, kv_layout_for
from engine.kv_memory import default_num_blocks
from engine.model_base import ModelFiles
from engine.model_files import open_model
from kvtransfer.choose import open_transports
from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory, ranks_to_proto, whole_layout
from kvtransfer.transport import Region, Transport
from legato.v1 import worker_pb2
from scheduler.batch import Scheduler, SchedulerConfig
from scheduler.handoff import HandoffConfig, Reservations
from scheduler.plan import StepPlan, StepResult
from service import logs
from service.config import EngineConfig, WorkerConfig
from service.messages import identity_text, layout_to_proto, model_identity
from service.model_source import resolve_model
from service.tokenizer import load_tokenizer
from spec.errors import InvalidConfiguration, TransportUnavailable
from spec.layout import KVLayout
from telemetry.setup import Telemetry
from worker.draft import open_draft_model
from worker.loop import EngineLoop
from worker.meter import Meter

logger = logs.get(__name__)

# Where no kv_memory is configured. Several workers share a laptop, so each is modest; a server configures it.
DEFAULT_KV_SHARE = 0.1
DEFAULT_KV_TOKENS = 32_768


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CoreRank(RankMemory):
    """One rank of this worker, as hand-overs see it."""

    # KV memory as transports see it, [num_blocks, layers, planes, heads, block_tokens, row]; where the rank computes on
    # a GPU it is a mirror on the host.
    landing: torch.Tensor = dataclasses.field(kw_only=True)


@dataclasses.dataclass(slots=True)
class Core:
    """Owned by the process; made by build_core(), ended by close()."""

    config: WorkerConfig
    cluster_key: bytes
    record: worker_pb2.WorkerRecord
    ranks: tuple[CoreRank, ...]  # by number
    engine: Engine
    transports: dict[str, Transport]
    regions: dict[str, Region]
    scheduler: Scheduler
    reservations: Reservations
    digest_pool: concurrent.futures.ThreadPoolExecutor
    meter: Meter
    loop: EngineLoop = dataclasses.field(init=False)

    def execute(self, plan: StepPlan) -> StepResult:
        """The loop's executor: the engine, counted."""
        started_s = time.monotonic()
        result = self.engine.execute(plan)
        self.meter.step(plan, result, time.monotonic() - started_s)
        return result

    def ranks_of(self, group: int) -> tuple[CoreRank, ...]:
        """Of one group (among dp): they hold the same blocks, each its layers and heads."""
        return tuple(rank for rank in self.ranks if rank.group == group)

    def hold(self, group: int, block_table: tuple[int, ...]) -> None:
        """Their content stays until unhold(), whatever happens to the sequence that owns them."""
        assert group == self.scheduler.config.group
        with self.loop.lock:
            self.scheduler.pool.hold(block_table)

    def unhold(self, group: int, block_table: tuple[int, ...]) -> None:
        assert group == self.scheduler.config.group
        with self.loop.lock:
            self.scheduler.pool.release(block_table)
        self.loop.wake()  # somebody may wait for these blocks

    async def stage_out(self, ranks: Sequence[CoreRank], block_ids: Sequence[int]) -> None:
        """Before these ranks' blocks are sent: brings them into their landing memory. Nothing to do where that is the
        engine's own."""
        if any(rank.landing is not self.engine.kv.tensor for rank in ranks):
            await asyncio.get_running_loop().run_in_executor(self.digest_pool, self._copy_out, torch.tensor(block_ids))

    async def stage_in(self, ranks: Sequence[CoreRank], block_ids: Sequence[int]) -> None:
        """After blocks landed and were found right: brings them into the engine's memory."""
        if any(rank.landing is not self.engine.kv.tensor for rank in ranks):
            copying = asyncio.get_running_loop().run_in_executor(
                self.digest_pool, self._copy_in, torch.tensor(block_ids)
            )
            try:
                await asyncio.shield(copying)
            finally:
                await asyncio.wait([copying])  # nobody frees these blocks while they are written

    def _copy_out(self, index: torch.Tensor) -> None:
        self.ranks[0].landing[index] = self.engine.kv.tensor[index.to(self.engine.device)].cpu()

    def _copy_in(self, index: torch.Tensor) -> None:
        self.engine.kv.tensor[index.to(self.engine.device)] = self.ranks[0].landing[index].to(self.engine.device)

    def load(self) -> worker_pb2.WorkerLoad:
        with self.loop.lock:
            load, totals = self.scheduler.load(), self.scheduler.totals()
            reserved = self.reservations.reserved_blocks()
        return worker_pb2.WorkerLoad(
            waiting_requests=load.waiting,
            running_requests=load.running,
            waiting_tokens=load.waiting_tokens,
            free_blocks=load.free_blocks,
            reserved_blocks=reserved,
            steps=totals["steps"],
            computed_tokens=totals["computed_tokens"],
            generated_tokens=totals["generated_tokens"],
            preemptions=totals["preemptions"],
            transferred_bytes=sum(transport.counts()["written_bytes"] for transport in self.transports.values()),
            refused_handoffs=self.meter.refused_handoffs,
        )

    def live(self) -> dict[str, int]:
        """Every count that must be as at start when nothing runs (promise P3)."""
        with self.loop.lock:
            counts = {f"scheduler.{name}": count for name, count in self.scheduler.counts().items()}
            counts |= {f"reservations.{name}": count for name, count in self.reservations.counts().items()}
        for name, transport in self.transports.items():
            moving = transport.counts()
            counts |= {f"{name}.{key}": moving[key] for key in ("regions", "transfers")}
        return counts

    def check(self) -> None:
        """Asserts every invariant; O(everything), for tests."""
        with self.loop.lock:
            self.scheduler.check()
            self.reservations.check()
            self.scheduler.pool.check()

    def close(self) -> None:
        self.loop.stop()
        self.digest_pool.shutdown(wait=True)
        for transport in self.transports.values():
            transport.close()


def build_core(config: WorkerConfig, telemetry: Telemetry, report: Callable[[str, float], None]) -> Core:
    """Loads and allocates; seconds to minutes. `report(what, fraction)` says how far it is.

    Raises the SetupErrors of spec/errors.py; nothing is left behind then but the process, which ends."""
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    model_path = resolve_model(config.engine.model, lambda fraction: report("fetching the model", fraction))
    files = open_model(model_path)
    load_tokenizer(model_path)  # routers read it from here: what is wrong with it is found now, and said
    options = EngineOptions(
        dtype=config.engine.dtype,
        device=config.engine.device,
        threads=config.engine.threads,
        block_tokens=config.engine.block_tokens,
    )
    layout = kv_layout_for(files.spec, options)
    num_blocks = _num_blocks(config.engine, layout, options)
    limit = files.spec.max_context_tokens
    max_context_tokens = min(config.engine.max_context_tokens or limit, limit)
    draft_model = open_draft_model(config, files.spec, options, num_blocks, max_context_tokens, report)
    transports, regions = _open_memory(config, num_blocks * layout.block_bytes)
    memory = next(iter(regions.values())).buffer
    on_cpu = options.torch_device().type == "cpu"
    engine = Engine(
        files,
        options,
        num_blocks,
        kv_buffer=memory if on_cpu else None,
        progress=lambda fraction: report("loading weights", fraction),
        draft_model=draft_model,
    )
    landing = engine.kv.tensor
    if not on_cpu:
        landing = torch.frombuffer(memory, dtype=engine.kv.tensor.dtype).view(engine.kv.tensor.shape)
    report("warming up", 0.0)
    engine.warm_up()
    ranks = (CoreRank(RankKV.whole(layout), landing=landing),)
    record = _record(config, files, engine, ranks, num_blocks, max_context_tokens, transports, regions)
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_tokens=layout.block_tokens,
            max_step_tokens=config.engine.max_step_tokens,
            max_sequences=config.engine.max_sequences,
            max_context_tokens=max_context_tokens,
            eos_token_ids=files.spec.eos_token_ids,
            cache_salt=identity_text(record.identity).encode() + files.revision.encode(),
            draft_model=draft_model is not None,
        )
    )
    reservations = Reservations(
        scheduler.pool,
        scheduler.prefix,
        HandoffConfig(config.engine.max_sequences, max_context_tokens, config.handoff.lease_s),
        consumer=f"{record.worker_id}/{record.epoch:x}",
        spare_blocks=scheduler.spare_blocks,
    )
    return Core(
        config=config,
        cluster_key=config.cluster_key.get_secret_value().encode(),
        record=record,
        ranks=ranks,
        engine=engine,
        transports=transports,
        regions=regions,
        scheduler=scheduler,
        reservations=reservations,
        meter=Meter(telemetry),
        digest_pool=concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="digest"),
    )


def _num_blocks(config: EngineConfig, layout: KVLayout, options: EngineOptions) -> int:
    if config.kv_memory is None:
        return default_num_blocks(layout, _free_bytes(options), DEFAULT_KV_SHARE, DEFAULT_KV_TOKENS)
    num_blocks = int(config.kv_memory) // layout.block_bytes
    if num_blocks < 2:
        raise InvalidConfiguration(
            f"engine.kv_memory of {config.kv_memory} bytes holds {num_blocks} blocks of {layout.block_bytes} bytes; "
            "at least 2 are needed"
        )
    return num_blocks


def _free_bytes(options: EngineOptions) -> int:
    device = options.torch_device()
    if device.type == "cuda":
        return int(min(torch.cuda.mem_get_info(device)[0], psutil.virtual_memory().available))
    return int(psutil.virtual_memory().available)


def host_of(address: str) -> str:
    """Of "host", "host:port", "::1" or "[::1]:port"."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def _transport_host(config: WorkerConfig) -> str:
    """The address of this host that peers write to: what is advertised, as a number."""
    name = host_of(config.advertise or config.host)
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise InvalidConfiguration(f"advertise names {name!r}, which has no address: {error.strerror}") from None


def _open_memory(config: WorkerConfig, nbytes: int) -> tuple[dict[str, Transport], dict[str, Region]]:
    """KV memory is allocated by the first transport that opens and registered with the others."""
    opened, reasons = open_transports(config.handoff.transports, _transport_host(config))
    for name, reason in reasons.items():
        logger.warning("transport %s is not available: %s", name, reason)
    if not opened:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise TransportUnavailable(f"no transport could be opened: {why}")
    regions = {opened[0].name: opened[0].register(nbytes)}
    memory = regions[opened[0].name].buffer
    for transport in opened[1:]:
        regions[transport.name] = transport.register(nbytes, memory)
    return {transport.name: transport for transport in opened}, regions


def _record(
    config: WorkerConfig,
    files: ModelFiles,
    engine: Engine,
    ranks: Sequence[CoreRank],
    num_blocks: int,
    max_context_tokens: int,
    transports: dict[str, Transport],
    regions: dict[str, Region],
) -> worker_pb2.WorkerRecord:
    """All but the address, which is known once the server listens."""
    role = worker_pb2.PREFILL if config.role == "prefill" else worker_pb2.DECODE
    return worker_pb2.WorkerRecord(
        worker_id=config.worker_id or f"{config.role}-{secrets.token_hex(4)}",
        role=role,
        epoch=time.time_ns(),  # grows from one start to the next, as the registry wants it
        identity=model_identity(config.engine.model, files.revision, engine.dtype),
        kv_layout=layout_to_proto(whole_layout(ranks)),
        ranks=ranks_to_proto(ranks),
        total_blocks=num_blocks,
        max_context_tokens=max_context_tokens,
        max_step_tokens=config.engine.max_step_tokens,
        endpoints=[
            worker_pb2.TransportEndpoint(name=name, address=transport.address, region=regions[name].descriptor)
            for name, transport in transports.items()
        ],
        model_path=str(files.path),
        pid=os.getpid(),
        vocab_size=files.spec.vocab_size,
        eos_token_ids=files.spec.eos_token_ids,
    )
