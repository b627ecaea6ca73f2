"""The check of one chunk: what lies in each rank's own memory is digested as it lands, and compared once it is told."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Sequence
from typing import Any

from kvtransfer.digest import HeldDigest, ToldDigest
from kvtransfer.plan import common
from legato.v1.rank_pb2 import RankCommand
from spec.errors import DigestMismatch
from worker.core import CoreRank
from worker.ranks import Ranks


class LandingCheck:
    """Of tokens [first_token, first_token + num_tokens) of a reservation, on all ranks of its group; replicas, too.
    Ranks on other hosts are asked."""

    def __init__(
        self,
        ranks: Sequence[CoreRank],
        pool: concurrent.futures.Executor,
        block_ids: Sequence[int],
        first_token: int,
        num_tokens: int,
        others: Ranks | None = None,
    ) -> None:
        """`others`: of this worker, where it has several ranks."""
        self.ranks, self.block_ids = ranks, block_ids
        self.first_token, self.num_tokens = first_token, num_tokens
        self._pool, self._others = pool, others
        given = block_ids, first_token, num_tokens
        self._digests = [ToldDigest() if rank.host else HeldDigest(rank, rank.landing, *given) for rank in ranks]
        self._end_layer = 0  # of what is taken

    async def take(self, end_layer: int) -> None:
        """The model's layers before `end_layer` have landed. Raises InvalidParameter for tokens that have no block,
        WorkerLost when a rank is gone."""
        layers = range(self._end_layer, max(self._end_layer, end_layer))
        self._end_layer = layers.stop
        event_loop, taking = asyncio.get_running_loop(), list[asyncio.Future[Any]]()
        for rank, digest in zip(self.ranks, self._digests, strict=True):
            if isinstance(digest, HeldDigest):
                taking += [event_loop.run_in_executor(self._pool, call) for call in digest.counting(layers)]
            elif common(layers, rank.kv.layers):
                taking.append(asyncio.ensure_future(self._ask(rank, digest, layers)))
        await asyncio.gather(*taking)

    async def _ask(self, rank: CoreRank, digest: ToldDigest, layers: range) -> None:
        assert self._others is not None
        asked = RankCommand.Digest(
            block_ids=self.block_ids,
            first_token=self.first_token,
            num_tokens=self.num_tokens,
            first_layer=layers.start,
            num_layers=len(layers),
        )
        answered = await asyncio.wrap_future(self._others.ask(rank.number, RankCommand(digest=asked)))
        digest.add(answered.sums)

    async def compare(self, sent: Sequence[bytes]) -> None:
        """All has landed. Raises DigestMismatch."""
        if len(sent) != len(self.ranks):
            raise DigestMismatch(f"{len(sent)} digests came for {len(self.ranks)} ranks")
        await self.take(max(rank.kv.layers.stop for rank in self.ranks))
        found = [digest.digest() for digest in self._digests]
        wrong = [number for number, digest in enumerate(sent) if digest != found[number]]
        if wrong:
            where = f" on rank {wrong[0]} of {len(self.ranks)}" if len(self.ranks) > 1 else ""
            raise DigestMismatch(
                f"{self.num_tokens} tokens from {self.first_token} on did not land{where} as they were sent"
            )
