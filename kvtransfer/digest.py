"""The digest of KV content: what the producer computed and what landed, compared as 16 bytes.

XXH3-128 (a checksum against mistakes, not a signature: the ticket is what is signed) over the bytes of the tokens in
canonical order (layer, plane, head, token), so that block size, block ids and the cut of layers and heads over ranks
leave no trace in it. One of them covers what one rank of the receiver holds, so that each rank checks its own memory;
the sender reads the same layers and heads out of the ranks from which they go there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
import torch
import xxhash

from kernels.cpu.row_digest import RowDigest, shared_digests
from kvtransfer.grids import Offsets
from kvtransfer.plan import RankKV, common
from kvtransfer.routes import RankMemory, Route
from spec.errors import InvalidParameter

_STAGE_BYTES = 1 << 20  # gathered and hashed while it is in the core's cache


class Part(NamedTuple):
    """A rectangle of layers and KV heads (by their index in the model), and where it is held."""

    kv: torch.Tensor  # [num_blocks, layers, planes, heads, block_tokens, row], a view of contiguous KV memory
    layers: range
    heads: range


def chunk_digest(parts: Sequence[Part], block_ids: Sequence[int], first_token: int, num_tokens: int) -> bytes:
    """Of one rectangle at once; see ChunkHasher.update()."""
    hasher = ChunkHasher()
    hasher.update(parts, block_ids, first_token, num_tokens)
    return hasher.digest()


class ChunkHasher:
    """Takes the layers of a chunk as they come, from the first on; each by one thread at a time."""

    def __init__(self) -> None:
        native = shared_digests()
        self._rows = None if native is None else RowDigest(native)
        self._hasher = xxhash.xxh3_128()  # of copies, where rows cannot be digested where they lie

    def update(self, parts: Sequence[Part], block_ids: Sequence[int], first_token: int, num_tokens: int) -> None:
        """Tokens [first_token, first_token + num_tokens) of a sequence, in all layers and heads of `parts`.

        parts      of one worker and group, in any order; together they are a rectangle, each layer and head once
        block_ids  the sequence's block table from token 0 on

        Raises InvalidParameter when the table is too short or names a block that there is not."""
        num_blocks, _, _, _, block_tokens, _ = parts[0].kv.shape
        end_token = first_token + num_tokens
        first_block, end_block = first_token // block_tokens, -(-end_token // block_tokens)
        if first_token < 0 or num_tokens < 1 or end_block > len(block_ids):
            raise InvalidParameter(f"holds {len(block_ids)} blocks, too few for {end_token} tokens", field="block_ids")
        used = list(block_ids[first_block:end_block])
        if min(used) < 0 or max(used) >= num_blocks:
            raise InvalidParameter(f"names a block outside [0, {num_blocks})", field="block_ids")

        skip = first_token - first_block * block_tokens
        if self._rows is not None:
            segments = _Segments.of(used, skip, num_tokens, block_tokens)
            for beside in _by_layers(parts):
                _add_rows(self._rows, beside, segments)
            return
        index = torch.tensor(used, dtype=torch.int64)
        for beside in _by_layers(parts):
            num_heads, row_bytes = sum(rows.shape[2] for rows in beside), beside[0].shape[-1]
            # Of layer · planes + plane.
            step = max(1, _STAGE_BYTES // (num_heads * len(used) * block_tokens * row_bytes))
            for plane in range(0, beside[0].shape[1], step):
                tokens = [
                    _tokens(rows[:, plane : plane + step], index)[:, :, skip : skip + num_tokens] for rows in beside
                ]
                one = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
                self._hasher.update(one.contiguous().cpu().numpy().data)

    def digest(self) -> bytes:
        """16 bytes, over all that came."""
        if self._rows is None:
            return self._hasher.digest()
        few = self._rows.few()
        return self._rows.digest() if few is None else xxhash.xxh3_128_digest(few)


class HeldDigest:
    """On the receiver's side: of one rank, over what it holds of one chunk."""

    def __init__(self, rank: RankMemory, landing: torch.Tensor) -> None:
        """landing: the rank's KV memory, [num_blocks, layers, planes, heads, block_tokens, row]"""
        self._rank, self._landing = rank, landing
        self._hasher = ChunkHasher()
        self._end = 0

    def update(self, block_ids: Sequence[int], first_token: int, num_tokens: int, end_layer: int) -> None:
        """The model's layers from where the last update ended to `end_layer`. Raises as ChunkHasher.update() does."""
        held = self._rank.kv
        own = common(range(self._end, end_layer), held.layers)
        self._end = max(self._end, end_layer)
        if own:
            self._hasher.update([_part(held, self._landing, own, held.heads)], block_ids, first_token, num_tokens)

    def digest(self) -> bytes:
        return self._hasher.digest()


class SentDigests:
    """On the sender's side: of each target rank, in order, over what the routes bring there of one chunk. Replicas that
    are sent the same are digested once."""

    def __init__(self, routes: Sequence[Route]) -> None:
        self._hashers: dict[tuple[tuple[int, range, range], ...], ChunkHasher] = {}
        self._targets = []
        for _, together in itertools.groupby(routes, key=lambda route: route.target):
            sent = tuple((route.source, route.layers, route.heads) for route in together)
            self._targets.append(self._hashers.setdefault(sent, ChunkHasher()))

    def update(
        self,
        ranks: Sequence[RankMemory],
        landings: Sequence[torch.Tensor],
        block_ids: Sequence[int],
        first_token: int,
        num_tokens: int,
        layers: range,
    ) -> None:
        """The chunk's next layers. Raises as ChunkHasher.update() does.

        landings  the KV memory of each of `ranks`, [num_blocks, layers, planes, heads, block_tokens, row]"""
        for sent, hasher in self._hashers.items():
            parts = [
                _part(ranks[number].kv, landings[number], own, heads)
                for number, held, heads in sent
                if (own := common(held, layers))
            ]
            if parts:
                hasher.update(parts, block_ids, first_token, num_tokens)

    def digests(self) -> list[bytes]:
        return [hasher.digest() for hasher in self._targets]


class DigestPolicy(NamedTuple):
    """Which chunks are digested, the same on both sides: a share of them is chosen by what both know of a chunk."""

    share: float  # 1: all, 0: none

    def covers(self, reservation_id: str, first_token: int) -> bool:
        drawn: int = xxhash.xxh3_64_intdigest(f"{reservation_id} {first_token}".encode())
        return drawn < self.share * 2**64


def _part(rank: RankKV, landing: torch.Tensor, layers: range, heads: range) -> Part:
    first_layer, first_head = rank.layers.start, rank.heads.start
    kv = landing[:, layers.start - first_layer : layers.stop - first_layer]
    return Part(kv[:, :, :, heads.start - first_head : heads.stop - first_head], layers, heads)


def _by_layers(parts: Sequence[Part]) -> Iterator[list[torch.Tensor]]:
    """Run by run of layers, those that hold its heads, in order: [num_blocks, layers · planes, heads, slots, bytes]."""
    cuts = sorted({cut for part in parts for cut in (part.layers.start, part.layers.stop)})
    for start, stop in itertools.pairwise(cuts):
        beside = sorted((part for part in parts if start in part.layers), key=lambda part: part.heads.start)
        yield [
            part.kv[:, start - part.layers.start : stop - part.layers.start].view(torch.uint8).flatten(1, 2)
            for part in beside
        ]


class _Segments(NamedTuple):
    """The tokens of each block. int64 [S]."""

    blocks: Offsets
    slots: Offsets  # the first one's
    num_tokens: Offsets

    @classmethod
    def of(cls, used: Sequence[int], skip: int, num_tokens: int, block_tokens: int) -> _Segments:
        starts = numpy.maximum(numpy.arange(len(used), dtype=numpy.int64) * block_tokens, skip)
        counts = numpy.diff(starts, append=skip + num_tokens)
        return cls(numpy.asarray(used, numpy.int64), starts % block_tokens, counts)


def _add_rows(digest: RowDigest, beside: Sequence[torch.Tensor], segments: _Segments) -> None:
    """In (layer · planes + plane, head, token) order; where one part has all heads, in one call."""
    num_planes = beside[0].shape[1]
    step = num_planes if len(beside) == 1 else 1
    for plane in range(0, num_planes, step):
        for rows in beside:
            block_stride, plane_stride, head_stride, slot_stride, _ = rows.stride()
            planes = numpy.arange(plane, plane + step, dtype=numpy.int64) * plane_stride
            heads = numpy.arange(rows.shape[2], dtype=numpy.int64) * head_stride
            units = numpy.add.outer(planes, heads).reshape(-1)
            places = segments.blocks * block_stride + segments.slots * slot_stride
            sizes = segments.num_tokens * slot_stride
            addresses = units.ctypes.data, len(units), places.ctypes.data, sizes.ctypes.data, len(places)
            digest.add(rows.data_ptr(), *addresses)


def _tokens(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[num_blocks, planes, heads, slots, bytes] -> [planes, heads, tokens of the blocks `index`, bytes]."""
    return rows.index_select(0, index).permute(1, 2, 0, 3, 4).flatten(2, 3)
