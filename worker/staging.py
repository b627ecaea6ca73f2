"""What one chunk is sent from: the ranks' own KV memory or, where decode keeps its KV in another dtype, a copy of it
that is converted once, in scratch memory which this hand-over owns."""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

import torch

from engine.kv_memory import TORCH_DTYPES
from kernels.kv_pack import copy_rows
from kvtransfer.plan import RankKV, common
from kvtransfer.routes import RankMemory, Route, routes_between
from kvtransfer.transport import Region
from worker.core import CoreRank


class SourceKV(NamedTuple):
    """This worker's KV memory, as a sender reads it."""

    ranks_of: Callable[[int], Sequence[CoreRank]]  # of a group; their landings lie in `region`
    region: Region
    register: Callable[[int], Region]  # of the transport by which it is sent
    # Brings blocks there from the device, of these ranks and the model's layers.
    stage_out: Callable[[Sequence[CoreRank], Sequence[int], range], Awaitable[None]]


class Staged(NamedTuple):
    """Some layers of one chunk, ready to be sent."""

    ranks: Sequence[RankMemory]
    region: Region
    block_table: Sequence[int]  # from token 0 on


class Staging:
    """Owned by one hand-over, used by one chunk at a time."""

    def __init__(self, source: SourceKV, target_ranks: Sequence[RankMemory], pool: concurrent.futures.Executor) -> None:
        self._source = source
        self._targets = tuple(rank.kv for rank in target_ranks)
        self._pool = pool
        self._scratch: Region | None = None

    def block_tokens(self, group: int) -> int:
        return self._source.ranks_of(group)[0].kv.layout.block_tokens

    def converts(self, group: int) -> bool:
        """Then what an earlier chunk was staged in is written anew by the next one."""
        return self._targets[0].layout.dtype is not self._source.ranks_of(group)[0].kv.layout.dtype

    def routes(self, group: int) -> Sequence[Route]:
        """Raises InvalidConfiguration when a target rank needs what no rank of the group holds."""
        return routes_between(tuple(rank.kv for rank in self._source.ranks_of(group)), self._targets)

    async def stage(
        self, group: int, block_table: Sequence[int], first_token: int, end_token: int, layers: range
    ) -> Staged:
        """Of the model's `layers` alone; those of one chunk are staged one after the other, from layer 0 on.

        Raises InvalidConfiguration when a target rank needs what no rank of the group holds, TransferFailed when the
        transport is closed."""
        ranks = self._source.ranks_of(group)
        readers = sorted({route.source for route in self.routes(group)})
        size = ranks[0].kv.layout.block_tokens
        first, end = first_token // size, -(-end_token // size)
        await self._source.stage_out([ranks[number] for number in readers], block_table[first:end], layers)
        if not self.converts(group):
            return Staged(ranks, self._source.region, block_table)
        scratch, region = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._converted, ranks, readers, block_table[first:end], (first_token, end_token), layers
        )
        table = [0] * first + list(range(end - first))  # of blocks before the first none is read
        return Staged(scratch, region, table)

    def _converted(
        self,
        ranks: Sequence[CoreRank],
        readers: Sequence[int],
        block_ids: Sequence[int],  # of these tokens
        tokens: tuple[int, int],
        layers: range,
    ) -> tuple[list[RankMemory], Region]:
        """The blocks of `readers`, one rank's after the other's; the other ranks have none."""
        dtype, scratch, nbytes = self._targets[0].layout.dtype, [], 0
        for number, rank in enumerate(ranks):
            layout = dataclasses.replace(rank.kv.layout, dtype=dtype)
            scratch.append(RankMemory(RankKV(layout, rank.kv.layers, rank.kv.heads), rank.group, nbytes))
            nbytes += len(block_ids) * layout.block_bytes if number in readers else 0
        region = self._scratch_of(nbytes)  # grows with the first layers of a chunk alone
        memory = torch.frombuffer(region.buffer, dtype=torch.uint8)
        table, places = torch.tensor(block_ids, dtype=torch.int64), torch.arange(len(block_ids))
        size, (first_token, end_token) = ranks[0].kv.layout.block_tokens, tokens
        for number in readers:
            source, target = ranks[number], scratch[number]
            held, layout = common(layers, source.kv.layers), target.kv.layout
            if not held:
                continue
            own = slice(held.start - source.kv.layers.start, held.stop - source.kv.layers.start)
            there = memory[target.offset_bytes :][: len(block_ids) * layout.block_bytes]
            landing = there.view(TORCH_DTYPES[dtype]).view(layout.shape(len(block_ids)))
            ends = source.landing[:, own], table, landing[:, own], places
            copy_rows(*ends, first_token, end_token - first_token, table_token=first_token - first_token % size)
        return scratch, region

    def _scratch_of(self, nbytes: int) -> Region:
        if self._scratch is None or self._scratch.buffer.nbytes < nbytes:
            self.release()
            self._scratch = self._source.register(nbytes)
        return self._scratch

    def release(self) -> None:
        """Nothing may be in flight. It is memory that no peer writes into."""
        if self._scratch is not None:
            self._scratch.release()
            self._scratch = None
