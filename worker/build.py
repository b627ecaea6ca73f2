"""A worker's parts, made in order:

the model's description ──▶ the other ranks are started, layers are timed ──▶ KV memory is sized and registered
──▶ all ranks join and load ──▶ warm-up ──▶ scheduler and reservations
"""

from __future__ import annotations

import concurrent.futures
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence

import torch

from engine.engine import Engine
from engine.grammar import Grammars
from engine.groups import Groups, join
from engine.layer_costs import LayerCosts, measure_layer_costs
from engine.model_files import open_model
from engine.speculation import DraftModel
from kernels.cpu.row_digest import shared_digests
from kvtransfer.choose import open_transports
from kvtransfer.plan import RankKV
from kvtransfer.probing import rdma_devices
from kvtransfer.routes import ranks_to_proto, whole_layout
from kvtransfer.transport import Region, Transport
from legato.v1 import common_pb2, rank_pb2, worker_pb2
from scheduler.batch import SchedulerConfig
from scheduler.handoff import HandoffConfig
from service import logs
from service.config import WorkerConfig
from service.messages import identity_text, layout_to_proto, model_identity
from service.model_source import resolve_model
from service.ports import free_port
from service.tokenizer import load_tokenizer
from service.wire import spoken
from spec.errors import InvalidConfiguration, LegatoError, TransportUnavailable
from spec.layout import KVLayout
from spec.shard import RankShard, check_layout, shard_of, stage_layers
from telemetry.setup import Telemetry
from worker.adapters import by_id, open_adapters
from worker.core import Core, CoreRank
from worker.draft import open_draft_model
from worker.executor import AllRanks, OneRank, StepExecutor
from worker.grammars import grammars_of
from worker.kv_region import RankMemories, RankRoom, choose_num_blocks, sized_from
from worker.lanes import LaneReservations, Lanes
from worker.meter import Meter
from worker.rank_setup import Place, free_bytes, host_name, layout_of, memory_name, options_for
from worker.ranks import Ranks
from worker.stage_times import StageTimes
from worker.tiers import open_tiers

logger = logs.get(__name__)

Report = Callable[[str, float], None]


def build_core(config: WorkerConfig, telemetry: Telemetry, report: Report, place: Place | None = None) -> Core:
    """Loads and allocates; seconds to minutes. `report(what, fraction)` says how far it is. `place`: of rank 0, where a
    launcher started this process and the other ranks.

    Raises the SetupErrors of spec/errors.py, WorkerLost when a rank dies meanwhile; nothing is left behind then but the
    process, which ends."""
    builder = _Builder(config, report, place or Place(local_ranks=layout_of(config).num_ranks))
    try:
        return builder.build(telemetry)
    except BaseException:
        builder.close()
        raise


class _Builder:
    """What is made on the way, so that all of it is closed when something fails."""

    def __init__(self, config: WorkerConfig, report: Report, place: Place) -> None:
        """Raises InvalidConfiguration, InvalidModel or UnsupportedModel."""
        self._config, self._report, self._place = config, report, place
        self._others: Ranks | None = None
        self._groups: Groups | None = None
        self._costs: LayerCosts | None = None
        self._transports: dict[str, Transport] = {}
        self._regions: dict[str, Region] = {}
        self._probe_offset = 0
        self._options = options_for(config.engine, place)
        if self._options.threads is not None:
            torch.set_num_threads(self._options.threads)
        self._layout = layout_of(config)
        model_path = resolve_model(config.engine.model, lambda fraction: report("fetching the model", fraction))
        self._files = open_model(model_path)
        self._adapters = open_adapters(
            config.engine, self._files.spec, lambda fraction: report("reading adapters", fraction)
        )
        load_tokenizer(model_path)  # routers read it from here: what is wrong with it is found now, and said
        check_layout(self._files.spec, self._layout)
        if self._layout.dp > 1 and config.engine.draft_model is not None:
            raise InvalidConfiguration(f"engine.draft_model is for layouts without dp; engine.layout is {self._layout}")
        if config.engine.expert_replicas and self._layout.ep == 1:
            raise InvalidConfiguration(
                f"engine.expert_replicas is for layouts with ep above 1; engine.layout is {self._layout}"
            )
        limit = self._files.spec.max_context_tokens
        self._max_context_tokens = min(config.engine.max_context_tokens or limit, limit)

    def close(self) -> None:
        if self._others is not None:
            self._others.close()
        if self._groups is not None:
            self._groups.close()
        for transport in self._transports.values():
            transport.close()

    def build(self, telemetry: Telemetry) -> Core:
        if self._layout.num_ranks > 1:
            self._report("starting ranks", 0.0)
            self._others = Ranks(self._config, self._layout.num_ranks, self._place)
            self._others.accept()
            self._refuse_hosts()
        self._costs = self._measured_costs()
        shards = [self._shard(rank) for rank in range(self._layout.num_ranks)]
        memory = self._place_memory(shards)
        draft_model = open_draft_model(
            self._config,
            self._files.spec,
            self._options,
            memory.num_blocks,
            self._max_context_tokens,
            self._report,
        )
        try:
            self._groups = self._join(shards, memory)
            grammars = grammars_of(self._files, shards[0], self._config.engine.max_sequences)
            engine = Engine(
                self._files,
                self._options,
                memory.num_blocks,
                kv_buffer=memory.part(0) if self._is_on_cpu else None,
                progress=self._loading,
                groups=self._groups,
                adapters=by_id(self._adapters),
                draft_model=draft_model if self._others is None else None,
                grammars=grammars,
            )
            self._warm_up(engine)
        finally:
            memory.close()
        return self._core(telemetry, engine, grammars, shards, memory, draft_model)

    def _measured_costs(self) -> LayerCosts | None:
        """Stages are balanced by what layers take here; one stage needs no balance."""
        if self._layout.pp == 1:
            return None
        self._report("measuring layers", 0.0)
        costs = measure_layer_costs(self._files, self._options, self._layout.tp)
        stages = stage_layers(self._files.spec, self._layout.pp, costs.layers, costs.head)
        logger.info(
            "stages of %s layers; a layer takes %s ms, the head %.2f ms",
            ", ".join(str(len(layers)) for layers in stages),
            " or ".join(f"{cost * 1e3:.2f}" for cost in sorted(set(costs.layers))),
            costs.head * 1e3,
        )
        return costs

    def _shard(self, rank: int) -> RankShard:
        costs = self._costs
        if costs is None:
            return shard_of(self._files.spec, self._layout, rank)
        return shard_of(self._files.spec, self._layout, rank, layer_costs=costs.layers, head_cost=costs.head)

    @property
    def _is_on_one_host(self) -> bool:
        here = host_name()
        return self._others is None or all(hello.host == here for hello in self._others.hellos.values())

    def _refuse_hosts(self) -> None:
        if self._is_on_one_host:
            return
        if self._config.role == "prefill":
            raise InvalidConfiguration(
                "ranks of a prefill worker must be on one host: from several, KV is not handed over in this version"
            )
        logger.warning("ranks are on several hosts: this worker takes no KV over, and prefills what it decodes")

    @property
    def _steps_out(self) -> int:
        return 1 if self._others is None else self._config.engine.micro_batches or self._layout.pp

    @property
    def _is_on_cpu(self) -> bool:
        return self._options.torch_device().type == "cpu"

    def _place_memory(self, shards: Sequence[RankShard]) -> RankMemories:
        """Of one rank the first transport that opens allocates the memory; the others take it as it is."""
        spec, options = self._files.spec, self._options
        layouts = [shard.kv_layout(spec, options.block_tokens, options.kv_dtype_for(spec)) for shard in shards]
        rooms = self._rooms(layouts)
        num_blocks = choose_num_blocks(self._config.engine, rooms, self._layout.dp)
        memory = RankMemories(layouts, num_blocks, shared=self._others is not None)
        opened, reasons = open_transports(self._config.handoff.transports, _transport_host(self._config))
        self._transports = {transport.name: transport for transport in opened}
        for name, reason in reasons.items():
            logger.warning("transport %s is not available: %s", name, reason)
        if not opened:
            why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise TransportUnavailable(f"no transport could be opened: {why}")
        for transport in opened:
            self._regions[transport.name] = region = transport.register(memory.nbytes, memory.whole)
            memory.whole = region.buffer
        self._probe_offset = memory.probe_offset
        logger.info(
            "KV memory: %s; sized from %s", memory.said(self._layout.dp), sized_from(self._config.engine, rooms)
        )
        return memory

    def _rooms(self, layouts: Sequence[KVLayout]) -> list[RankRoom]:
        found = [(host_name(), memory_name(self._options), free_bytes(self._options))]
        if self._others is not None:
            hellos = [hello for _, hello in sorted(self._others.hellos.items())]
            found += [(hello.host, hello.memory, hello.free_bytes) for hello in hellos]
        return [
            RankRoom(layout, f"{host} {memory}", free)
            for layout, (host, memory, free) in zip(layouts, found, strict=True)
        ]

    def _join(self, shards: Sequence[RankShard], memory: RankMemories) -> Groups | None:
        if self._others is None:
            return None
        host = self._place.control[0] if self._place.control is not None else "127.0.0.1"
        address = f"{host}:{free_port(host, 0)}"
        here = host_name()
        for rank, hello in self._others.hellos.items():
            load = rank_pb2.RankCommand.Load(
                join_address=address,
                num_blocks=memory.num_blocks,
                memory_path=memory.path if hello.host == here else "",
                offset_bytes=memory.offsets[rank],
                layer_costs=() if self._costs is None else self._costs.layers,
                head_cost=0.0 if self._costs is None else self._costs.head,
                adapters=by_id(self._adapters),
            )
            self._others.send(rank, rank_pb2.RankCommand(load=load))
        try:
            device, timeout_s = self._options.torch_device(), self._config.engine.rank_timeout_s
            return self._others.unless_lost(lambda: join(shards[0], address, device, timeout_s))
        except LegatoError as error:
            raise self._others.cause(error) from None

    def _loading(self, fraction: float) -> None:
        """Of the rank that is the last."""
        if self._others is not None:
            if self._others.lost is not None:
                raise self._others.lost
            fraction = min(fraction, *self._others.progress.values())
        self._report("loading weights", fraction)

    def _warm_up(self, engine: Engine) -> None:
        others = self._others
        if others is not None:
            others.wait_ready(lambda fraction: self._report("loading weights", fraction))
            for rank in others.hellos:
                others.send(rank, rank_pb2.RankCommand(warm_up=rank_pb2.RankCommand.WarmUp()))
        self._report("warming up", 0.0)
        try:
            engine.warm_up()
        except LegatoError as error:
            raise error if others is None else others.cause(error) from None
        if others is not None:
            others.wait_ready()

    def _core(
        self,
        telemetry: Telemetry,
        engine: Engine,
        grammars: Grammars,
        shards: Sequence[RankShard],
        memory: RankMemories,
        draft_model: DraftModel | None,
    ) -> Core:
        config, is_on_cpu = self._config, self._is_on_cpu
        ranks = tuple(
            CoreRank(
                RankKV(memory.layouts[shard.rank], shard.layers, shard.kv_heads),
                shard.group,
                memory.offsets[shard.rank],
                landing=engine.kv.tensor if shard.rank == 0 and is_on_cpu else memory.landing(shard.rank),
                number=shard.rank,
            )
            for shard in shards
        )
        record = self._record(engine, ranks, memory.num_blocks * self._layout.dp)
        lanes = self._lanes(record, memory.num_blocks, draft_model is not None)
        meter = Meter(telemetry)
        group = [rank for rank in ranks if rank.group == 0]
        tiers = open_tiers(self._config.kv_tiers, self._content_salt(record).decode(), group)
        shared_digests()  # compiled where it must be, before anybody waits for it
        executor: StepExecutor = OneRank(engine, meter)
        if self._others is not None:
            stages = StageTimes(self._layout.pp, telemetry)
            executor = AllRanks(
                engine,
                self._others,
                shards,
                self._steps_out,
                meter,
                draft_model,
                stages,
                config.engine.expert_replicas,
            )
        return Core(
            config=config,
            cluster_key=config.cluster_key.get_secret_value().encode(),
            record=record,
            ranks=ranks,
            engine=engine,
            grammars=grammars,
            others=self._others,
            executor=executor,
            landings_are_kv=is_on_cpu,
            transports=self._transports,
            regions=self._regions,
            scheduler=lanes,
            reservations=LaneReservations(
                lanes,
                lambda group: HandoffConfig(
                    config.engine.max_sequences, self._max_context_tokens, config.handoff.lease_s, group=group
                ),
                consumer=f"{record.worker_id}/{record.epoch:x}",
            ),
            meter=meter,
            tiers=tiers,
            digest_pool=concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="digest"),
        )

    def _lanes(self, record: worker_pb2.WorkerRecord, num_blocks: int, has_draft_model: bool) -> Lanes:
        engine = self._config.engine
        return Lanes.of(
            SchedulerConfig(
                num_blocks=num_blocks,
                block_tokens=engine.block_tokens,
                max_step_tokens=engine.max_step_tokens,
                max_sequences=engine.max_sequences,
                max_context_tokens=self._max_context_tokens,
                eos_token_ids=self._files.spec.eos_token_ids,
                cache_salt=self._content_salt(record),
                draft_model=has_draft_model,
                group=group,
                steps_out=self._steps_out,
            )
            for group in range(self._layout.dp)
        )

    def _content_salt(self, record: worker_pb2.WorkerRecord) -> bytes:
        return (identity_text(record.identity) + self._files.revision).encode()

    def _record(self, engine: Engine, ranks: Sequence[CoreRank], total_blocks: int) -> worker_pb2.WorkerRecord:
        """All but the address, which is known once the server listens."""
        config, files = self._config, self._files
        return worker_pb2.WorkerRecord(
            worker_id=config.worker_id or f"{config.role}-{secrets.token_hex(4)}",
            role=worker_pb2.PREFILL if config.role == "prefill" else worker_pb2.DECODE,
            epoch=time.time_ns(),  # grows from one start to the next, as the registry wants it
            identity=model_identity(config.engine.model, files.revision, engine.dtype, config.engine.quantisation),
            kv_layout=layout_to_proto(whole_layout(ranks)),
            ranks=ranks_to_proto(ranks),
            total_blocks=total_blocks,
            max_context_tokens=self._max_context_tokens,
            max_step_tokens=config.engine.max_step_tokens,
            endpoints=[
                worker_pb2.TransportEndpoint(
                    name=name,
                    address=transport.address,
                    region=self._regions[name].descriptor,
                    probe_offset=self._probe_offset,
                )
                for name, transport in (self._transports.items() if self._is_on_one_host else ())
            ],
            model_path=str(files.path),
            pid=os.getpid(),
            vocab_size=files.spec.vocab_size,
            eos_token_ids=files.spec.eos_token_ids,
            wire=spoken(),
            rdma_devices=rdma_devices(),
            adapters=[common_pb2.Adapter(name=name, revision=a.revision) for name, a in self._adapters.items()],
        )


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
