"""The digest of KV content: what the producer computed and what landed, compared as 16 bytes.

XXH3-128 (a checksum against mistakes, not a signature: the ticket is what is signed) of the sums over all rows
(row_sums.py), each of which counts by its place (layer, plane, head, token) in the model and sequence, so that block
size, block ids, the cut of layers and heads over ranks and the order in which rows are read leave no trace in it. One
of them covers what one rank of the receiver holds, so that each rank checks its own memory; the sender adds up the same
rows as they go there.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy
import torch
import xxhash

from kvtransfer.grids import Grid, Sums, TransferPlan
from kvtransfer.plan import RankGrids, common, segments_of
from kvtransfer.routes import RankMemory, Route
from kvtransfer.row_sums import add_rows, no_rows
from spec.errors import InvalidParameter

THREADS = 2  # that digest one shipment
_SHARE_BYTES = 2 << 20  # that it pays to give a thread of its own

_adding = threading.Lock()


def digest_of(sums: Sums) -> bytes:
    """16 bytes."""
    return xxhash.xxh3_128_digest(sums.astype("<u8").tobytes())


def counting(plan: TransferPlan, source: int) -> list[Callable[[], None]]:
    """Calls that add the rows of a plan to its sums, each for a thread of its own; they lie in memory at address
    `source`, which the caller holds."""
    counted = [grid for grid in plan.grids if grid.rows is not None]
    nbytes = sum(grid.nbytes for grid in counted)
    shares = [functools.partial(_count, counted, source)]
    if nbytes >= THREADS * _SHARE_BYTES:
        most = -(-nbytes // THREADS)
        parts = [part for grid in counted for part in grid.cut(most, most // 4, sys.maxsize)]
        shares = [functools.partial(_count, parts[number::THREADS], source) for number in range(THREADS)]
    return list(shares)


def _count(grids: Sequence[Grid], source: int) -> None:
    for grid in grids:
        assert grid.rows is not None
        sums, total = no_rows(), grid.rows.sums
        add_rows(sums, grid, source)
        with _adding:
            total += sums


class HeldDigest:
    """On the receiver's side: of one rank, over what it holds of one chunk."""

    def __init__(
        self, rank: RankMemory, landing: torch.Tensor, block_ids: Sequence[int], first_token: int, num_tokens: int
    ) -> None:
        """Of tokens [first_token, first_token + num_tokens); the block table begins at token 0 of the sequence.

        landing: the rank's KV memory, [num_blocks, layers, planes, heads, block_tokens, row], contiguous

        Raises InvalidParameter when the table is too short or names a block that there is not."""
        assert landing.is_contiguous()
        layout, num_blocks = rank.kv.layout, landing.shape[0]
        segments = segments_of(layout, block_ids, layout, block_ids, first_token, num_tokens)
        if segments.source_blocks.max() >= num_blocks:
            raise InvalidParameter(f"names a block outside [0, {num_blocks})", field="block_ids")
        self._rank, self._landing = rank.kv, landing
        self._sums = no_rows()
        self._grids = RankGrids(segments, rank.kv, 0, rank.kv, 0, self._sums)

    def counting(self, layers: range) -> list[Callable[[], None]]:
        """Calls that take those of the model's `layers` that the rank holds, each for a thread of its own. A layer is
        to be taken once, in any order."""
        if not common(self._rank.layers, layers):
            return []
        return counting(TransferPlan(self._grids.of(layers)), self._landing.data_ptr())

    def sums(self) -> bytes:
        """Of what was taken: for the ToldDigest of another process."""
        return self._sums.astype("<u8").tobytes()

    def digest(self) -> bytes:
        return digest_of(self._sums)


class ToldDigest:
    """A HeldDigest of memory that other processes read: they tell the sums of layers, each once and in any order."""

    def __init__(self) -> None:
        self._sums = no_rows()

    def add(self, sums: bytes) -> None:
        """As HeldDigest.sums() gives them."""
        self._sums += numpy.frombuffer(sums, "<u8")

    def digest(self) -> bytes:
        return digest_of(self._sums)


class SentDigests:
    """On the sender's side: of each target rank, in order, over what the routes bring there of one chunk. Replicas that
    are sent the same are digested once. `sums` are of each target rank, None for those that another's stand for: a plan
    with these counts the rows."""

    def __init__(self, routes: Sequence[Route]) -> None:
        counted: dict[tuple[tuple[int, range, range], ...], Sums] = {}
        self.sums: list[Sums | None] = []
        self._of_targets: list[Sums] = []
        for _, together in itertools.groupby(routes, key=lambda route: route.target):
            sent = tuple((route.source, route.layers, route.heads) for route in together)
            self.sums.append(None if sent in counted else counted.setdefault(sent, no_rows()))
            self._of_targets.append(counted[sent])

    def digests(self) -> list[bytes]:
        return [digest_of(sums) for sums in self._of_targets]


class DigestPolicy(NamedTuple):
    """Which chunks are digested, the same on both sides: a share of them is chosen by what both know of a chunk."""

    share: float  # 1: all, 0: none

    def covers(self, reservation_id: str, first_token: int) -> bool:
        drawn: int = xxhash.xxh3_64_intdigest(f"{reservation_id} {first_token}".encode())
        return drawn < self.share * 2**64
