"""KV memory of a worker whose ranks have their weights: measured on all of them, sized, and given to each.

all ranks: measure ──▶ rank 0: how many blocks, one mapping for all ──▶ registered by the caller ──▶ all ranks: placed
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from engine.engine import Engine, EngineOptions
from legato.v1 import rank_pb2
from service import logs
from service.config import EngineConfig
from spec.errors import LegatoError
from spec.model import ModelSpec
from spec.shard import RankShard
from worker.device_memory import measure
from worker.kv_region import RankMemories
from worker.kv_sizing import MemoryUse, RankRoom, choose_num_blocks, said
from worker.rank_setup import host_name
from worker.ranks import Ranks

logger = logs.get(__name__)


def measure_all(config: EngineConfig, engine: Engine, draft: Engine | None, others: Ranks | None) -> list[MemoryUse]:
    """By rank. Raises as measure() does, and what the worker is lost for."""
    if others is None:
        return [measure(engine, config, draft)]
    others.send_all(rank_pb2.RankCommand(measure=rank_pb2.RankCommand.Measure()))
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
    others: Ranks | None,
) -> RankMemories:
    """Whoever calls closes it. Raises as choose_num_blocks() does."""
    layouts = [shard.kv_layout(spec, options.block_tokens, options.kv_dtype_for(spec)) for shard in shards]
    hosts = [host_name()]
    if others is not None:
        hosts += [hello.host for _, hello in sorted(others.hellos.items())]
    drafts = [0 if draft is None else draft.kv.layout.block_bytes, *[0] * (len(shards) - 1)]
    rooms = [RankRoom(*each) for each in zip(hosts, uses, layouts, drafts, strict=True)]
    share, groups = config.gpu_memory_share, shards[0].layout.dp
    num_blocks = choose_num_blocks(config.kv_memory, rooms, share, groups)
    logger.info("KV memory: %s", said(config.kv_memory, rooms, share, num_blocks, groups))
    return RankMemories(layouts, num_blocks, shared=others is not None)


def place(memory: RankMemories, engine: Engine, draft: Engine | None, others: Ranks | None) -> None:
    """Each rank takes its part of the memory, which has been registered; on a GPU it is a mirror."""
    num_blocks = memory.num_blocks
    if others is not None:
        here = host_name()
        for rank, hello in others.hellos.items():
            path = memory.path if hello.host == here else ""
            part = rank_pb2.RankCommand.PlaceKV(
                num_blocks=num_blocks, memory_path=path, offset_bytes=memory.offsets[rank]
            )
            others.send(rank, rank_pb2.RankCommand(place_kv=part))
    engine.place_kv(num_blocks, memory.part(0) if engine.device.type == "cpu" else None)
    if draft is not None:
        draft.place_kv(num_blocks)
    if others is not None:
        others.wait_ready()
