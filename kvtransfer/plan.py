"""Which bytes go where: from the layouts of two ranks and their block tables to pieces of two memories. Pure.

KV memory is block-major (spec/layout.py): the byte of (block, layer, plane, head, slot) lies at

    block · block_bytes + ((layer · planes + plane) · num_kv_heads + head) · run_bytes + slot · row_bytes

A *segment* is a run of tokens within one block on both sides; a *unit* is a run of bytes within a block that is
contiguous on both sides. Pieces = segments × units, and remain that (grids.py); where a whole block of all layers is
one unit, as between equal layouts, adjacent blocks become one piece.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from kvtransfer.grids import Grid, Offsets, Rows, Sums, TransferPlan
from spec.errors import InvalidConfiguration, InvalidParameter
from spec.layout import KVLayout


@dataclasses.dataclass(frozen=True, slots=True)
class RankKV:
    """What one rank holds: layers and KV heads by their index in the model, as half-open ranges with step 1.

    Raises InvalidConfiguration when they do not have the sizes that `layout` says."""

    layout: KVLayout
    layers: range
    heads: range

    def __post_init__(self) -> None:
        sizes = (len(self.layers), len(self.heads))
        if sizes != (self.layout.num_layers, self.layout.num_kv_heads) or self.layers.step != 1 or self.heads.step != 1:
            raise InvalidConfiguration(
                f"layers {self.layers} and heads {self.heads} do not fit a layout of {self.layout.num_layers} layers "
                f"and {self.layout.num_kv_heads} KV heads"
            )

    @classmethod
    def whole(cls, layout: KVLayout) -> RankKV:
        """The only rank of its worker: all layers, all heads."""
        return cls(layout, range(layout.num_layers), range(layout.num_kv_heads))


class Segments(NamedTuple):
    """The tokens to carry, cut where a block of either side ends. The same for all ranks of two workers. int64 [S]."""

    source_blocks: Offsets
    source_slots: Offsets
    target_blocks: Offsets
    target_slots: Offsets
    num_tokens: Offsets
    is_whole: NDArray[numpy.bool_]  # a block on both sides
    first_tokens: Offsets  # of the sequence


def plan_transfer(
    source: RankKV,
    source_blocks: Sequence[int],
    target: RankKV,
    target_blocks: Sequence[int],
    first_token: int,
    num_tokens: int,
) -> TransferPlan:
    """The pieces that carry tokens [first_token, first_token + num_tokens) of what both ranks hold.

    Both block tables begin at token 0 of the sequence. Offsets are bytes into the two KV memories. No piece when the
    ranks have no layer or no head in common. Raises InvalidConfiguration for ranks that no copy converts (other dtype,
    head_dim or planes), InvalidParameter for a block table that is too short or names a target block twice.
    """
    segments = segments_of(source.layout, source_blocks, target.layout, target_blocks, first_token, num_tokens)
    return TransferPlan(RankGrids(segments, source, 0, target, 0).of(source.layers))


def segments_of(
    source: KVLayout,
    source_blocks: Sequence[int],
    target: KVLayout,
    target_blocks: Sequence[int],
    first_token: int,
    num_tokens: int,
) -> Segments:
    """Raises InvalidParameter as plan_transfer() does."""
    if num_tokens <= 0 or first_token < 0:
        raise InvalidParameter(
            f"[{first_token}, {first_token} + {num_tokens}) is no range of tokens", field="num_tokens"
        )
    end_token = first_token + num_tokens
    source_table = _table(source_blocks, source, end_token, "source_blocks")
    target_table = _table(target_blocks, target, end_token, "target_blocks")
    touched = target_table[first_token // target.block_tokens : target.blocks_for(end_token)]
    if len(numpy.unique(touched)) != len(touched):
        raise InvalidParameter("names a block twice", field="target_blocks")
    starts, lengths = _cut(first_token, end_token, source.block_tokens, target.block_tokens)
    source_indices, source_slots = numpy.divmod(starts, source.block_tokens)
    target_indices, target_slots = numpy.divmod(starts, target.block_tokens)
    is_whole = (lengths == source.block_tokens) & (lengths == target.block_tokens)
    blocks = source_table[source_indices], target_table[target_indices]
    return Segments(blocks[0], source_slots, blocks[1], target_slots, lengths, is_whole, starts)


class RankGrids:
    """What one rank sends another of one chunk, in offsets into memories in which the ranks' own begin at those given:
    the tokens are placed once, layers are cut out of them as they leave. Immutable, but for the sums."""

    def __init__(
        self,
        segments: Segments,
        source: RankKV,
        source_offset_bytes: int,
        target: RankKV,
        target_offset_bytes: int,
        sums: Sums | None = None,
    ) -> None:
        """The segments are of ranks with these block sizes. Where `sums` are given, grids say which rows they carry,
        and pieces that touch stay apart. Raises InvalidConfiguration as plan_transfer() does."""
        _check_convertible(source.layout, target.layout)
        self._source, self._target, self._sums = source, target, sums
        row_bytes = source.layout.row_bytes
        source_bases = segments.source_blocks * source.layout.block_bytes + segments.source_slots * row_bytes
        target_bases = segments.target_blocks * target.layout.block_bytes + segments.target_slots * row_bytes
        source_bases += source_offset_bytes
        target_bases += target_offset_bytes
        lengths = segments.num_tokens * row_bytes
        self._groups = [
            _Group(
                bool(segments.is_whole[first]),
                segments.first_tokens[first:last],
                (source_bases[first:last], target_bases[first:last], lengths[first:last]),
            )
            for first, last in _runs_of_equal(segments.is_whole)
        ]

    def of(self, layers: range) -> list[Grid]:
        """Of those of the model's `layers` that both ranks hold."""
        grids = []
        for group in self._groups:
            units, first_runs = _units(self._source, self._target, layers, whole_blocks=group.is_whole)
            rows = None
            if self._sums is not None:
                heads, row_bytes = common(self._source.heads, self._target.heads), self._source.layout.row_bytes
                rows = Rows(group.first_tokens, first_runs, len(heads), heads.start, row_bytes, self._sums)
            grids.append(Grid(*group.places, *units, rows))
        if self._sums is not None:
            return grids
        if all(len(grid.source_units) == 1 for grid in grids):
            return [_merged(grids)]
        return [_merged([grid]) if len(grid.source_units) == 1 else grid for grid in grids]


class _Group(NamedTuple):
    """Segments next to each other, all of them whole blocks or none."""

    is_whole: bool
    first_tokens: Offsets
    places: tuple[Offsets, Offsets, Offsets]  # source and target bases, bytes of a run


def _check_convertible(source: KVLayout, target: KVLayout) -> None:
    for field in ("dtype", "head_dim", "planes"):
        ours, theirs = getattr(source, field), getattr(target, field)
        if ours != theirs:
            raise InvalidConfiguration(f"KV {field} differs between the ranks: {ours} and {theirs}", field=field)


def _table(blocks: Sequence[int], layout: KVLayout, end_token: int, field: str) -> Offsets:
    table = numpy.asarray(blocks, dtype=numpy.int64)
    if len(table) < layout.blocks_for(end_token):
        raise InvalidParameter(f"holds {len(table)} blocks, {end_token} tokens need more", field=field)
    if table.min() < 0:
        raise InvalidParameter("holds a negative block", field=field)
    return table


def _cut(first_token: int, end_token: int, source_step: int, target_step: int) -> tuple[Offsets, Offsets]:
    """Start and length, in tokens, of each run that crosses no block boundary of either side."""
    cuts = [
        numpy.arange((first_token // step + 1) * step, end_token, step, dtype=numpy.int64)
        for step in {source_step, target_step}
    ]
    starts = numpy.unique(numpy.concatenate([numpy.array([first_token], dtype=numpy.int64), *cuts]))
    return starts, numpy.diff(starts, append=end_token)


def _runs_of_equal(flags: NDArray[numpy.bool_]) -> list[tuple[int, int]]:
    cuts = [0, *(numpy.flatnonzero(numpy.diff(flags)) + 1).tolist(), len(flags)]
    return list(itertools.pairwise(cuts))


def _units(
    source: RankKV, target: RankKV, asked: range, *, whole_blocks: bool
) -> tuple[tuple[Offsets, Offsets, Offsets], Offsets]:
    """((source offset, target offset, number of heads' runs) within a block, the first run's number as Rows counts), of
    what the ranks have in common.

    Only in whole blocks does one head's run touch the next, so only there do units grow beyond one head: to all heads
    in common and, where these are all that either rank holds, to all layers in common of those asked for."""
    layers = common(common(source.layers, target.layers), asked)
    heads = common(source.heads, target.heads)
    each = source.layout.planes
    planes = numpy.arange(each * layers.start, each * layers.stop, dtype=numpy.int64)  # layer · planes + plane
    runs_of_a_unit = 1
    if whole_blocks and heads:
        runs_of_a_unit = len(heads)
        if source.heads == target.heads and layers:
            runs_of_a_unit *= len(planes)
            planes = planes[:1]
    first_heads = numpy.arange(heads.start, heads.stop, len(heads) if whole_blocks and heads else 1, dtype=numpy.int64)

    def offsets(rank: RankKV) -> Offsets:
        runs = (planes - each * rank.layers.start)[:, None] * rank.layout.num_kv_heads + (
            first_heads - rank.heads.start
        )
        flat: Offsets = (runs * rank.layout.run_bytes).reshape(-1)
        return flat

    runs = numpy.full(len(planes) * len(first_heads), runs_of_a_unit, numpy.int64)
    first_runs: Offsets = (planes[:, None] * len(heads) + (first_heads - heads.start)).reshape(-1)
    return (offsets(source), offsets(target), runs), first_runs


def common(left: range, right: range) -> range:
    """What is in both; empty where nothing is."""
    start = max(left.start, right.start)
    return range(start, max(start, min(left.stop, right.stop)))


def _merged(grids: Sequence[Grid]) -> Grid:
    """Of one unit each: neighbours that touch on both sides become one piece."""
    sources = numpy.concatenate([grid.source_bases + grid.source_units for grid in grids])
    targets = numpy.concatenate([grid.target_bases + grid.target_units for grid in grids])
    sizes = numpy.concatenate([grid.segment_bytes * grid.unit_runs for grid in grids])
    touches = (sources[:-1] + sizes[:-1] == sources[1:]) & (targets[:-1] + sizes[:-1] == targets[1:])
    heads = numpy.concatenate([numpy.zeros(1, numpy.int64), numpy.flatnonzero(~touches) + 1])
    alone = numpy.zeros(1, numpy.int64)
    return Grid(sources[heads], targets[heads], numpy.add.reduceat(sizes, heads), alone, alone, alone + 1)
