"""How many blocks of KV each group of a worker gets. Pure: what was measured goes in, a number comes out.

Of a GPU, with `share` of it for this worker, shared by the worker's ranks on it:

    for KV = min( share · total − weights − activations,              what this worker may take
                  free − HEADROOM · total − activations )             what others have left
    blocks = for KV / bytes of one block of each of the ranks

`free` is what the device says when weights are loaded; `activations` the peak of the largest step above that.
What the share leaves, HEADROOM at the least, is for CUDA graphs, collectives and fragments. KV of a GPU has a mirror in
its host's memory, which must fit, too. All ranks of a group hold the same blocks, so the shortest memory decides.

On a CPU, that other workers and the user's programs share, it is a small part of what is free.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from spec.errors import InvalidConfiguration
from spec.layout import KVLayout

HEADROOM = 0.05  # of a GPU's memory
HOST_SHARE = 0.5  # of the host's free memory, for the mirrors of its GPUs
CPU_SHARE = 0.1  # of the host's free memory. Several workers share a laptop, so each is modest; a server configures it.
CPU_TOKENS = 32_768  # at most
LEAST_TOKENS = 2_048  # of each group: fewer serve nobody

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of one rank, when its weights are loaded and it holds no KV. `device` is "cpu", or names the GPU on its host."""

    device: str
    total_bytes: int  # of the device
    free_bytes: int  # of the device
    weight_bytes: int
    activation_bytes: int  # the most that a step takes above the weights; not measured on a CPU, 0
    host_free_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class RankRoom:
    """`draft_block_bytes`: of a second model whose KV lies in as many blocks of the same device."""

    host: str
    use: MemoryUse
    layout: KVLayout
    draft_block_bytes: int = 0

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes + self.draft_block_bytes

    @property
    def is_on_gpu(self) -> bool:
        return self.use.device != "cpu"


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """What is there for the KV of `num_ranks` ranks in the memory called `where`; negative: so much is missing."""

    where: str
    available_bytes: int
    limit_bytes: int  # what may be taken where `available_bytes` are too few to serve anybody
    block_bytes: int  # one block of each of these ranks
    num_ranks: int
    advice: str  # what makes it larger

    @property
    def num_blocks(self) -> int:
        return max(0, self.available_bytes // self.block_bytes)


def budgets(rooms: Sequence[RankRoom], share: float) -> list[Budget]:
    """One for each memory that ranks share. 0 < share <= 1, of each GPU."""
    found = []
    for (host, device), sharing in _by(rooms, lambda room: (room.host, room.use.device)).items():
        free, advice = min(room.use.free_bytes for room in sharing), "close other programs"
        available, limit = int(CPU_SHARE * free), free
        if sharing[0].is_on_gpu:
            total = sharing[0].use.total_bytes
            activations = sum(room.use.activation_bytes for room in sharing)
            weights = sum(room.use.weight_bytes for room in sharing)
            available = math.floor(min(share * total - weights, free - HEADROOM * total)) - activations
            limit, advice = available, "raise engine.gpu_memory_share, lower engine.max_step_tokens"
        block_bytes = sum(room.block_bytes for room in sharing)
        found.append(Budget(f"{device} of {host}", available, limit, block_bytes, len(sharing), advice))
    for host, sharing in _by((room for room in rooms if room.is_on_gpu), lambda room: room.host).items():
        available = int(HOST_SHARE * min(room.use.host_free_bytes for room in sharing))
        block_bytes = sum(room.layout.block_bytes for room in sharing)  # a draft model's KV has no mirror
        advice = "free memory of the host, in which KV of a GPU has a mirror"
        found.append(Budget(f"host memory of {host}", available, available, block_bytes, len(sharing), advice))
    return found


def choose_num_blocks(kv_memory: int | None, rooms: Sequence[RankRoom], share: float, groups: int) -> int:
    """Of each group: as many as fit into `kv_memory` bytes with those of all ranks, or None: what the shortest memory
    holds.

    Raises InvalidConfiguration where that is too little to serve, and says how many GiB are missing of what."""
    if kv_memory is not None:
        return _as_configured(kv_memory, rooms)
    block_tokens = rooms[0].layout.block_tokens
    least = -(-LEAST_TOKENS // block_tokens)
    found = budgets(rooms, share)
    for budget in found:
        if (missing := least * budget.block_bytes - budget.limit_bytes) > 0:
            raise InvalidConfiguration(
                f"{budget.where} is too small: KV for {LEAST_TOKENS} tokens of {budget.num_ranks} ranks does not fit "
                f"beside weights and activations, {_gib(missing)} are missing; {budget.advice}, quantise "
                "(engine.quantisation, engine.kv_dtype), or take a layout of more ranks (engine.layout)"
            )
    num_blocks = min(budget.num_blocks for budget in found)
    if not any(room.is_on_gpu for room in rooms):
        num_blocks = min(num_blocks, -(-CPU_TOKENS // (groups * block_tokens)))
    return max(least, num_blocks)


def _as_configured(kv_memory: int, rooms: Sequence[RankRoom]) -> int:
    block_bytes = sum(room.layout.block_bytes for room in rooms)
    num_blocks = kv_memory // block_bytes
    if num_blocks < 2:
        raise InvalidConfiguration(
            f"engine.kv_memory of {kv_memory} bytes holds {num_blocks} blocks of {block_bytes} bytes; "
            "at least 2 are needed"
        )
    on_gpu = [room for room in rooms if room.is_on_gpu]
    takings = []  # where, what of it is free, what is wanted of it
    for (host, device), sharing in _by(rooms, lambda room: (room.host, room.use.device)).items():
        free = min(room.use.free_bytes for room in sharing) - sum(room.use.activation_bytes for room in sharing)
        takings.append((f"{device} of {host}", free, sum(room.block_bytes for room in sharing)))
    for host, sharing in _by(on_gpu, lambda room: room.host).items():  # a draft model's KV has no mirror
        free = min(room.use.host_free_bytes for room in sharing)
        takings.append(
            (f"the host memory of {host}, its mirror", free, sum(room.layout.block_bytes for room in sharing))
        )
    for where, free, of_a_block in takings:
        if (wanted := num_blocks * of_a_block) > free:
            raise InvalidConfiguration(
                f"engine.kv_memory of {_gib(kv_memory)} takes {_gib(wanted)} of {where}, and {_gib(wanted - free)} "
                "are missing beside weights and activations: set less, or leave it unset"
            )
    return num_blocks


def said(kv_memory: int | None, rooms: Sequence[RankRoom], share: float, num_blocks: int, groups: int) -> str:
    """What the memory is and what it was sized from, in a line for a log."""
    block_tokens = rooms[0].layout.block_tokens
    blocks = num_blocks * groups
    uses = [room.use for room in rooms]
    activations = "not measured" if not rooms[0].is_on_gpu else _each(use.activation_bytes for use in uses)
    if kv_memory is not None:
        source = f"engine.kv_memory, {kv_memory / 2**20:.1f} MiB"
    elif rooms[0].is_on_gpu:
        shortest = min(budgets(rooms, share), key=lambda budget: budget.num_blocks)
        source = f"{_gib(shortest.available_bytes)} for KV in {shortest.where}, engine.gpu_memory_share {share:g}"
    else:
        source = f"{CPU_SHARE:.0%} of what is free, at most {CPU_TOKENS} tokens"
    return (
        f"{blocks} blocks of {block_tokens} tokens, {blocks * block_tokens} tokens; of each rank: "
        f"KV {_each(num_blocks * room.layout.block_bytes for room in rooms)}, "
        f"weights {_each(use.weight_bytes for use in uses)}, activations {activations}, "
        f"free before KV {_each(use.free_bytes for use in uses)}; sized from {source}"
    )


def _by(rooms: Iterable[RankRoom], key: Callable[[RankRoom], Key]) -> dict[Key, list[RankRoom]]:
    found: dict[Key, list[RankRoom]] = {}
    for room in rooms:
        found.setdefault(key(room), []).append(room)
    return found


def _each(sizes: Iterable[int]) -> str:
    """Ranks in a row that have the same are said once."""
    runs = [(size, len(list(run))) for size, run in itertools.groupby(f"{size / 2**20:.1f}" for size in sizes)]
    return ", ".join(size if count == 1 else f"{count} × {size}" for size, count in runs) + " MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
