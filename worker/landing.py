"""The check of one chunk: what lies in each rank's own memory is digested as it lands, and compared once it is told."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Sequence

from kvtransfer.digest import HeldDigest
from spec.errors import DigestMismatch
from worker.core import CoreRank


class LandingCheck:
    """Of tokens [first_token, first_token + num_tokens) of a reservation, on all ranks of its group; replicas, too."""

    def __init__(
        self,
        ranks: Sequence[CoreRank],
        pool: concurrent.futures.Executor,
        block_ids: Sequence[int],
        first_token: int,
        num_tokens: int,
    ) -> None:
        self.ranks, self.block_ids = ranks, block_ids
        self.first_token, self.num_tokens = first_token, num_tokens
        self._pool = pool
        given = block_ids, first_token, num_tokens
        self._digests = [HeldDigest(rank, rank.landing, *given) for rank in ranks]
        self._end_layer = 0  # of what is taken

    async def take(self, end_layer: int) -> None:
        """The model's layers before `end_layer` have landed. Raises InvalidParameter for tokens that have no block."""
        layers = range(self._end_layer, max(self._end_layer, end_layer))
        self._end_layer = layers.stop
        calls = [call for digest in self._digests for call in digest.counting(layers)]
        event_loop = asyncio.get_running_loop()
        await asyncio.gather(*(event_loop.run_in_executor(self._pool, call) for call in calls))

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
