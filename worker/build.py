"""A worker's parts, made in order:

the model's description ──▶ the other ranks are started, layers are timed ──▶ all ranks join, load, and measure what is
free ──▶ KV memory is sized, registered on each host, and each rank takes its part ──▶ warm-up ──▶ scheduler and
reservations
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence

import torch

from engine.engine import Engine
from engine.grammar import Grammars
from engine.groups import Groups, join
from engine.kv_memory import TORCH_DTYPES
from engine.layer_costs import LayerCosts
from engine.model_files import open_model
from engine.speculation import DraftModel
from kernels.cpu.row_digest import shared_row_sums
from kvtransfer.plan import RankKV
from legato.v1 import rank_pb2, worker_pb2
from scheduler.batch import SchedulerConfig
from scheduler.handoff import HandoffConfig
from service import logs
from service.config import WorkerConfig
from service.model_source import resolve_model
from service.ports import free_port
from service.tokenizer import load_tokenizer
from spec.errors import InvalidConfiguration, LegatoError
from spec.shard import RankShard, check_layout
from telemetry.setup import Telemetry
from worker.adapters import by_id, open_adapters
from worker.core import Core, CoreRank
from worker.device_memory import blocks_to_measure, fitting
from worker.draft import open_draft_model
from worker.endpoints import Endpoints, transport_address
from worker.executor import AllRanks, OneRank, StepExecutor
from worker.grammars import grammars_of
from worker.kv_placement import keep, measure_all, place, size
from worker.kv_region import HostRegion, KVPlaces
from worker.lanes import LaneReservations, Lanes
from worker.meter import Meter
from worker.partition import measured_costs, shards_of
from worker.rank_setup import Place, host_name, layout_of, options_for
from worker.ranks import Ranks
from worker.record import content_salt, record_of
from worker.stage_times import StageTimes
from worker.tiers import configured_tier, open_tiers

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
        self._endpoints: Endpoints | None = None
        self._hosts = [host_name()]  # by rank
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
        if config.engine.micro_batches and self._layout.pp == 1:
            raise InvalidConfiguration(
                f"engine.micro_batches is for layouts with pp above 1; engine.layout is {self._layout}"
            )
        self._max_context_tokens = self._options.context_of(self._files.spec)

    def close(self) -> None:
        if self._others is not None:
            self._others.close()
        if self._groups is not None:
            self._groups.close()
        if self._endpoints is not None:
            self._endpoints.close()

    def build(self, telemetry: Telemetry) -> Core:
        if self._layout.num_ranks > 1:
            self._report("starting ranks", 0.0)
            self._others = Ranks(self._config, self._layout.num_ranks, self._place)
            self._others.accept()
            self._hosts += [hello.host for _, hello in sorted(self._others.hellos.items())]
            self._refuse_hosts()
        if self._layout.pp > 1:
            self._report("measuring layers", 0.0)
            self._costs = measured_costs(self._files, self._options, self._layout)
        shards = shards_of(self._files.spec, self._layout, self._costs)
        self._endpoints = Endpoints(self._config.handoff.transports, transport_address(self._config))
        draft = open_draft_model(self._config, self._files.spec, self._options, self._max_context_tokens, self._report)
        draft_model = None if draft is None else DraftModel(draft)
        self._groups = self._join(shards)
        grammars = grammars_of(self._files, shards[0], self._config.engine.max_sequences)
        engine = self._load(grammars, draft_model if self._others is None else None)
        self._report("measuring memory", 0.0)
        uses = measure_all(self._config.engine, engine, draft, self._others)
        places = size(self._config.engine, self._files.spec, self._options, shards, uses, draft, self._hosts)
        region = HostRegion(places.region_bytes[0], shared=self._others is not None)
        try:
            kept = keep(places, region, self._endpoints, self._others)
            place(places, region, kept, engine, draft, self._others)
        finally:
            region.close()
        self._warm_up(engine, draft)
        ranks = self._ranks(shards, places, region, engine)
        advertised = [endpoint for each in kept for endpoint in each.endpoints]
        return self._core(telemetry, engine, grammars, shards, ranks, advertised, places.num_blocks, draft_model)

    def _load(self, grammars: Grammars, draft_model: DraftModel | None) -> Engine:
        """When it returns all ranks have their weights, and hardly any KV memory."""
        told = 0.0

        def progress(fraction: float) -> None:
            nonlocal told
            told = fraction
            self._loading(fraction)

        device = self._options.torch_device()
        with fitting(device, "the weights of rank 0", lambda: told):
            engine = Engine(
                self._files,
                self._options,
                blocks_to_measure(self._config.engine, device),
                progress=progress,
                groups=self._groups,
                adapters=by_id(self._adapters),
                draft_model=draft_model,
                grammars=grammars,
            )
        if self._others is not None:
            self._others.wait_ready(lambda fraction: self._report("loading weights", fraction))
        return engine

    def _refuse_hosts(self) -> None:
        if len(set(self._hosts)) == 1:
            return
        where = f"ranks of this worker are on {len(set(self._hosts))} hosts"
        if self._config.role == "prefill":
            raise InvalidConfiguration(
                f"{where}: KV is not handed over from several in this version, and role prefill is for one host"
            )
        if (key := configured_tier(self._config.kv_tiers)) is not None:
            raise InvalidConfiguration(f"{where}: {key} is for ranks on one host")

    @property
    def _steps_out(self) -> int:
        return 1 if self._others is None else self._config.engine.micro_batches or self._layout.pp

    @property
    def _is_on_cpu(self) -> bool:
        return self._options.torch_device().type == "cpu"

    def _join(self, shards: Sequence[RankShard]) -> Groups | None:
        if self._others is None:
            return None
        self._report("joining ranks", 0.0)
        host = self._place.control[0] if self._place.control is not None else "127.0.0.1"
        address = f"{host}:{free_port(host, 0)}"
        load = rank_pb2.RankCommand.Load(
            join_address=address,
            layer_costs=() if self._costs is None else self._costs.layers,
            head_cost=0.0 if self._costs is None else self._costs.head,
            adapters=by_id(self._adapters),
        )
        self._others.send_all(rank_pb2.RankCommand(load=load))
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

    def _warm_up(self, engine: Engine, draft: Engine | None) -> None:
        others = self._others
        if others is not None:
            others.send_all(rank_pb2.RankCommand(warm_up=rank_pb2.RankCommand.WarmUp()))
        self._report("warming up", 0.0)
        try:
            if draft is not None:
                draft.warm_up()
            engine.warm_up()
        except LegatoError as error:
            raise error if others is None else others.cause(error) from None
        if others is not None:
            others.wait_ready()

    def _ranks(
        self, shards: Sequence[RankShard], places: KVPlaces, region: HostRegion, engine: Engine
    ) -> tuple[CoreRank, ...]:
        ranks = []
        for shard in shards:
            rank, layout = shard.rank, places.layouts[shard.rank]
            landing = torch.empty(layout.shape(0), dtype=TORCH_DTYPES[layout.dtype])
            if rank == 0 and self._is_on_cpu:
                landing = engine.kv.tensor
            elif places.hosts[rank] == 0:
                landing = region.landing(places, rank)
            held = RankKV(layout, shard.layers, shard.kv_heads)
            memory = held, shard.group, places.offsets[rank], places.hosts[rank]
            ranks.append(CoreRank(*memory, landing=landing, number=rank))
        return tuple(ranks)

    def _core(
        self,
        telemetry: Telemetry,
        engine: Engine,
        grammars: Grammars,
        shards: Sequence[RankShard],
        ranks: tuple[CoreRank, ...],
        advertised: Sequence[worker_pb2.TransportEndpoint],
        num_blocks: int,
        draft_model: DraftModel | None,
    ) -> Core:
        config, endpoints = self._config, self._endpoints
        assert endpoints is not None
        record = record_of(
            config,
            self._files,
            self._adapters,
            ranks,
            advertised,
            dtype=engine.dtype,
            total_blocks=num_blocks * self._layout.dp,
            max_context_tokens=self._max_context_tokens,
        )
        lanes = self._lanes(record, num_blocks, draft_model is not None)
        meter = Meter(telemetry)
        if engine.graph_failure:
            meter.graphs_refused()
            logger.warning("no CUDA graphs, each kernel of a decode step is launched: %s", engine.graph_failure)
        group = [rank for rank in ranks if rank.group == 0]
        tiers = open_tiers(self._config.kv_tiers, content_salt(record, self._files).decode(), group)
        shared_row_sums()  # compiled where it must be, before anybody waits for it
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
            landings_are_kv=self._is_on_cpu,
            transports=endpoints.transports,
            regions=endpoints.regions,
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
                cache_salt=content_salt(record, self._files),
                draft_model=has_draft_model,
                group=group,
                steps_out=self._steps_out,
            )
            for group in range(self._layout.dp)
        )
