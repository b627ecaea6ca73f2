"""Which bytes go where: from the layouts of two ranks and their block tables to pieces of two memories. Pure.

KV memory is block-major (spec/layout.py): the byte of (block, layer, plane, head, slot) lies at

    block · block_bytes + ((layer · planes + plane) · num_kv_heads + head) · run_bytes + slot · row_bytes

A *segment* is a run of tokens within one block on both sides; a *unit* is a run of bytes within a block that is
contiguous on both sides. Pieces = segments × units, neighbours merged: with equal layouts a whole block becomes one
piece, and adjacent blocks become one.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy
from numpy.typing import NDArray

from kvtransfer.transport import Piece
from spec.errors import InvalidConfiguration, InvalidParameter
from spec.layout import KVLayout

Offsets = NDArray[numpy.int64]


class Spans(NamedTuple):
    """Runs of bytes to copy, as three arrays of one length."""

    sources: Offsets
    targets: Offsets
    sizes: Offsets


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


def plan_transfer(
    source: RankKV,
    source_blocks: Sequence[int],
    target: RankKV,
    target_blocks: Sequence[int],
    first_token: int,
    num_tokens: int,
) -> list[Piece]:
    """The pieces that carry tokens [first_token, first_token + num_tokens) of what both ranks hold.

    Both block tables begin at token 0 of the sequence. Offsets are bytes into the two KV memories. An empty list when
    the ranks have no layer or no head in common. Raises InvalidConfiguration for ranks that no copy converts (other
    dtype, head_dim or planes), InvalidParameter for a block table that is too short or names a target block twice.
    """
    return pieces_of([spans(source, source_blocks, target, target_blocks, first_token, num_tokens)])


def spans(
    source: RankKV,
    source_blocks: Sequence[int],
    target: RankKV,
    target_blocks: Sequence[int],
    first_token: int,
    num_tokens: int,
) -> Spans:
    """What plan_transfer() gives, before neighbours are merged. Raises as it does."""
    _check_convertible(source.layout, target.layout)
    if num_tokens <= 0 or first_token < 0:
        raise InvalidParameter(
            f"[{first_token}, {first_token} + {num_tokens}) is no range of tokens", field="num_tokens"
        )
    end_token = first_token + num_tokens
    source_table = _table(source_blocks, source.layout, end_token, "source_blocks")
    target_table = _table(target_blocks, target.layout, end_token, "target_blocks")
    touched = target_table[first_token // target.layout.block_tokens : target.layout.blocks_for(end_token)]
    if len(numpy.unique(touched)) != len(touched):
        raise InvalidParameter("names a block twice", field="target_blocks")

    starts, lengths = _segments(first_token, end_token, source.layout.block_tokens, target.layout.block_tokens)
    row_bytes = source.layout.row_bytes
    source_bases = _bases(starts, source_table, source.layout, row_bytes)
    target_bases = _bases(starts, target_table, target.layout, row_bytes)
    whole = (lengths == source.layout.block_tokens) & (lengths == target.layout.block_tokens)

    parts: list[Spans] = []
    for first, last in _runs_of_equal(whole):
        units = _units(source, target, whole_blocks=bool(whole[first]))
        group = slice(first, last)
        parts.append(_cross(source_bases[group], target_bases[group], lengths[group] * row_bytes, units))
    return _joined(parts)


def pieces_of(parts: Sequence[Spans]) -> list[Piece]:
    """All of them as pieces, neighbours merged."""
    return _merged(_joined(parts))


def _joined(parts: Sequence[Spans]) -> Spans:
    if len(parts) == 1:
        return parts[0]
    return Spans(*(numpy.concatenate(column) for column in zip(*parts, strict=True)))


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


def _segments(first_token: int, end_token: int, source_step: int, target_step: int) -> tuple[Offsets, Offsets]:
    """Start and length, in tokens, of each run that crosses no block boundary of either side."""
    cuts = [
        numpy.arange((first_token // step + 1) * step, end_token, step, dtype=numpy.int64)
        for step in {source_step, target_step}
    ]
    starts = numpy.unique(numpy.concatenate([numpy.array([first_token], dtype=numpy.int64), *cuts]))
    return starts, numpy.diff(starts, append=end_token)


def _bases(starts: Offsets, table: Offsets, layout: KVLayout, row_bytes: int) -> Offsets:
    """Byte offset of a segment's first row in head 0 of layer 0 of its block."""
    blocks, slots = numpy.divmod(starts, layout.block_tokens)
    bases: Offsets = table[blocks] * layout.block_bytes + slots * row_bytes
    return bases


def _runs_of_equal(flags: NDArray[numpy.bool_]) -> list[tuple[int, int]]:
    cuts = [0, *(numpy.flatnonzero(numpy.diff(flags)) + 1).tolist(), len(flags)]
    return list(itertools.pairwise(cuts))


def _units(source: RankKV, target: RankKV, *, whole_blocks: bool) -> tuple[Offsets, Offsets, Offsets]:
    """(source offset, target offset, number of heads' runs) within a block, of what the ranks have in common.

    Only in whole blocks does one head's run touch the next, so only there do units grow beyond one head."""
    layers = _common(source.layers, target.layers)
    heads = _common(source.heads, target.heads)
    heads_of_a_unit = max(len(heads), 1) if whole_blocks else 1
    first_heads = numpy.arange(heads.start, heads.stop, heads_of_a_unit, dtype=numpy.int64)
    each = source.layout.planes
    planes = numpy.arange(each * layers.start, each * layers.stop, dtype=numpy.int64)  # layer · planes + plane

    def offsets(rank: RankKV) -> Offsets:
        runs = (planes - each * rank.layers.start)[:, None] * rank.layout.num_kv_heads + (
            first_heads - rank.heads.start
        )
        flat: Offsets = (runs * rank.layout.run_bytes).reshape(-1)
        return flat

    return offsets(source), offsets(target), numpy.full(len(planes) * len(first_heads), heads_of_a_unit, numpy.int64)


def _common(left: range, right: range) -> range:
    start = max(left.start, right.start)
    return range(start, max(start, min(left.stop, right.stop)))


def _cross(
    source_bases: Offsets, target_bases: Offsets, run_bytes: Offsets, units: tuple[Offsets, Offsets, Offsets]
) -> Spans:
    source_units, target_units, unit_runs = units
    return Spans(
        (source_bases[:, None] + source_units).reshape(-1),
        (target_bases[:, None] + target_units).reshape(-1),
        (run_bytes[:, None] * unit_runs).reshape(-1),
    )


def _merged(spans: Spans) -> list[Piece]:
    """Neighbours in the list that touch on both sides become one piece."""
    sources, targets, sizes = spans
    if len(sizes) == 0:
        return []
    touches = (sources[:-1] + sizes[:-1] == sources[1:]) & (targets[:-1] + sizes[:-1] == targets[1:])
    heads = numpy.concatenate([numpy.zeros(1, numpy.int64), numpy.flatnonzero(~touches) + 1])
    merged_sizes = numpy.add.reduceat(sizes, heads)
    return list(map(Piece, sources[heads].tolist(), targets[heads].tolist(), merged_sizes.tolist()))
