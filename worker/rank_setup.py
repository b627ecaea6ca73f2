"""What every rank of a worker finds out alike: its place, and from the configuration its layout, options and device."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import torch

from engine.engine import EngineOptions
from kvtransfer.frames import host_id
from service.config import EngineConfig, WorkerConfig
from spec.errors import InvalidConfiguration
from spec.layout import ParallelLayout


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where this process stands among the ranks of its worker. `control`: host and port at which rank 0 listens for
    the others; None where rank 0 starts them itself."""

    rank: int = 0
    local_rank: int = 0
    local_ranks: int = 1  # of this worker on this host
    control: tuple[str, int] | None = None


def place_from(environment: Mapping[str, str], layout: ParallelLayout) -> Place:
    """As torchrun says it. The control connection takes the port after MASTER_PORT, which is the launcher's own.

    Raises InvalidConfiguration where it starts another number of ranks than the layout has."""
    if "RANK" not in environment:
        return Place(local_ranks=layout.num_ranks)
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment["LOCAL_RANK"])
        local_ranks = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        control = environment["MASTER_ADDR"], int(environment["MASTER_PORT"]) + 1
    except (KeyError, ValueError) as error:
        raise InvalidConfiguration(
            f"RANK is set, and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT do not describe a launch: "
            f"{error!r}"
        ) from None
    if world_size != layout.num_ranks or not 0 <= rank < world_size:
        raise InvalidConfiguration(
            f"engine.layout {layout} takes {layout.num_ranks} ranks, and rank {rank} of {world_size} was started"
        )
    return Place(rank, local_rank, local_ranks, control)


def layout_of(config: WorkerConfig) -> ParallelLayout:
    """Raises InvalidConfiguration."""
    return ParallelLayout.parse(config.engine.layout)


def options_for(config: EngineConfig, place: Place) -> EngineOptions:
    """Raises InvalidConfiguration for a device that is not there."""
    threads = config.threads
    if threads is None and place.local_ranks > 1:
        threads = max(1, (os.cpu_count() or 1) // place.local_ranks)
    device = config.device
    if device in ("auto", "cuda") and place.local_ranks > 1 and torch.cuda.is_available():
        device = f"cuda:{place.local_rank % torch.cuda.device_count()}"
    return EngineOptions(
        dtype=config.dtype,
        device=device,
        threads=threads,
        block_tokens=config.block_tokens,
        kv_dtype=config.kv_dtype,
        quantisation=config.quantisation,
        activations=config.activations,
        max_context_tokens=config.max_context_tokens,
        graph_rows=config.max_sequences if config.cuda_graphs == "auto" else 0,
    )


def host_name() -> str:
    """Equal for processes that see each other's memory: of one machine, and not in containers of their own."""
    space = "/proc/self/ns/pid"
    return f"{host_id()} {os.readlink(space) if os.path.exists(space) else ''}".strip()


def host_numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Of the ranks' hosts, by rank: equal for equal names, from 0 on, rank 0's first."""
    known = list(dict.fromkeys(names))
    return tuple(known.index(name) for name in names)


def keepers_of(hosts: Sequence[int]) -> tuple[int, ...]:
    """By host the lowest of its ranks, which keeps the KV memory of them all."""
    return tuple(hosts.index(host) for host in range(max(hosts) + 1))
