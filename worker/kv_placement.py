"""KV memory of a worker whose ranks have their weights: measured on all of them, sized, and given to each.

all ranks: measure ──▶ rank 0: how many blocks ──▶ keepers: one mapping a host, registered ──▶ all ranks: placed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine.engine import Engine, EngineOptions
from legato.v1.rank_pb2 import RankCommand, RankReport
from service import logs
from service.config import EngineConfig
from spec.errors import LegatoError
from spec.model import ModelSpec
from spec.shard import RankShard
from worker.device_memory import measure
from worker.endpoints import Endpoints
from worker.kv_region import HostRegion, KVPlaces
from worker.kv_sizing import MemoryUse, RankRoom, choose_num_blocks, said
from worker.rank_setup import host_numbers, keepers_of
from worker.ranks import Ranks

logger = logs.get(__name__)


def measure_all(config: EngineConfig, engine: Engine, draft: Engine | None, others: Ranks | None) -> list[MemoryUse]:
    """By rank. Raises as measure() does, and what the worker is lost for."""
    if others is None:
        return [measure(engine, config, draft)]
    others.send_all(RankCommand(measure=RankCommand.Measure()))
    try:
        own = measure(engine, config, draft)
    except LegatoError as error:
        raise others.cause(error) from None
    others.wait_ready()
    names = [field.name for field in dataclasses.fields(MemoryUse)]
    found = [others.measured[rank] for rank in sorted(others.measured)]
    return [own, *(MemoryUse(**{name: getattr(use, name) for name in names}) for use in found)]


def size(
    config: EngineConfig,
    spec: ModelSpec,
    options: EngineOptions,
    shards: Sequence[RankShard],
    uses: Sequence[MemoryUse],
    draft: Engine | None,
    hosts: Sequence[str],
) -> KVPlaces:
    """`hosts`: names, by rank. Raises as choose_num_blocks() does."""
    layouts = [shard.kv_layout(spec, options.block_tokens, options.kv_dtype_for(spec)) for shard in shards]
    drafts = [0 if draft is None else draft.kv.layout.block_bytes, *[0] * (len(shards) - 1)]
    rooms = [RankRoom(*each) for each in zip(hosts, uses, layouts, drafts, strict=True)]
    share, groups = config.gpu_memory_share, shards[0].layout.dp
    num_blocks = choose_num_blocks(config.kv_memory, rooms, share, groups)
    logger.info("KV memory: %s", said(config.kv_memory, rooms, share, num_blocks, groups))
    return KVPlaces(layouts, num_blocks, host_numbers(hosts))


def keep(places: KVPlaces, region: HostRegion, endpoints: Endpoints, others: Ranks | None) -> list[RankReport.Kept]:
    """By host: the memory of each is made and registered by its keeper, that of rank 0's in `region`."""
    endpoints.register(region)
    kept = [RankReport.Kept(memory_path=region.path, endpoints=endpoints.advertised(0, places.probe_offsets[0]))]
    if others is None:
        return kept
    keepers = keepers_of(places.hosts)[1:]
    for host, rank in enumerate(keepers, 1):
        command = RankCommand.KeepKV(
            host=host, region_bytes=places.region_bytes[host], probe_offset=places.probe_offsets[host]
        )
        others.send(rank, RankCommand(keep_kv=command))
    others.wait_ready(of=len(keepers))
    return [*kept, *(others.kept[rank] for rank in keepers)]


def place(
    places: KVPlaces,
    region: HostRegion,
    kept: Sequence[RankReport.Kept],
    engine: Engine,
    draft: Engine | None,
    others: Ranks | None,
) -> None:
    """Each rank takes its part of its host's memory, which has been registered; on a GPU it is a mirror."""
    num_blocks = places.num_blocks
    if others is not None:
        for rank in others.hellos:
            part = RankCommand.PlaceKV(
                num_blocks=num_blocks,
                memory_path=kept[places.hosts[rank]].memory_path,
                offset_bytes=places.offsets[rank],
            )
            others.send(rank, RankCommand(place_kv=part))
    engine.place_kv(num_blocks, region.part(places, 0) if engine.device.type == "cpu" else None)
    if draft is not None:
        draft.place_kv(num_blocks)
    if others is not None:
        others.wait_ready()
