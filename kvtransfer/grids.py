"""Many pieces in few numbers: a plan is a list of grids, and whoever moves the bytes moves them grid by grid.

Between layouts that are cut unlike each other a block falls into a piece per layer, plane and head, and a long prompt
into millions. But they repeat from segment to segment: piece (s, u) of a grid goes

    from source_bases[s] + source_units[u]  to target_bases[s] + target_units[u],  segment_bytes[s] · unit_runs[u] bytes

Where a digest is taken of what a grid carries, it says which rows of KV that is.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

import numpy
from numpy.typing import NDArray

from kvtransfer.transport import Piece

Offsets = NDArray[numpy.int64]
Sums = NDArray[numpy.uint64]  # [9]: of rows, see row_sums.py

WINDOW_PIECES = 4096  # expanded at a time


class Rows(NamedTuple):
    """What the pieces of a grid hold: run number first_runs[u] + r is one plane and head, counted as (layer · planes +
    plane) · num_heads + (head - first_head). In it lie the rows of tokens first_tokens[s] and on, one by one."""

    first_tokens: Offsets  # [S]
    first_runs: Offsets  # [U]
    num_heads: int
    first_head: int
    row_bytes: int
    sums: Sums  # to which they are added by whoever digests them


class Grid(NamedTuple):
    """In bytes, int64. Segments share the length, or units the number of runs: never do both differ."""

    source_bases: Offsets  # [S]
    target_bases: Offsets  # [S]
    segment_bytes: Offsets  # [S], of one run
    source_units: Offsets  # [U]
    target_units: Offsets  # [U]
    unit_runs: Offsets  # [U]
    rows: Rows | None = None

    @property
    def num_pieces(self) -> int:
        return len(self.source_bases) * len(self.source_units)

    @property
    def nbytes(self) -> int:
        return int(self.segment_bytes.sum() * self.unit_runs.sum())

    def ends(self) -> tuple[int, int]:
        """Behind the last byte read and the last byte written."""
        if (self.unit_runs == self.unit_runs[0]).all():
            sizes = self.segment_bytes * self.unit_runs[0]
            return (
                int((self.source_bases + sizes).max() + self.source_units.max()),
                int((self.target_bases + sizes).max() + self.target_units.max()),
            )
        sizes = self.unit_runs * self.segment_bytes[0]
        return (
            int(self.source_bases.max() + (self.source_units + sizes).max()),
            int(self.target_bases.max() + (self.target_units + sizes).max()),
        )

    def cut(self, piece_bytes: int, group_bytes: int, group_numbers: int) -> Iterator[Grid]:
        """The same bytes in the same order, a part at a time: whole pieces of `group_bytes` together at most, of as
        many segments and units (at least two) as `group_numbers`; or one piece, or `piece_bytes` of a longer one."""
        num_units = len(self.source_units)
        totals = self.segment_bytes * self.unit_runs.sum()
        if num_units == 1 or (num_units < group_numbers and totals.max() <= group_bytes):
            for several in _groups(totals, group_bytes, group_numbers - num_units):
                yield from self._part(several, slice(num_units))._split(piece_bytes)
            return
        for segment, segment_bytes in enumerate(self.segment_bytes):
            for several in _groups(segment_bytes * self.unit_runs, group_bytes, group_numbers - 1):
                yield from self._part(slice(segment, segment + 1), several)._split(piece_bytes)

    def _part(self, segments: slice, units: slice) -> Grid:
        rows = self.rows
        if rows is not None:
            rows = rows._replace(first_tokens=rows.first_tokens[segments], first_runs=rows.first_runs[units])
        bases = self.source_bases[segments], self.target_bases[segments], self.segment_bytes[segments]
        places = self.source_units[units], self.target_units[units], self.unit_runs[units]
        return Grid(*bases, *places, rows)

    def _split(self, piece_bytes: int) -> Iterator[Grid]:
        if self.num_pieces > 1 or self.nbytes <= piece_bytes:
            yield self
            return
        if self.rows is not None:
            yield from self._split_by_runs(self.rows, max(1, piece_bytes // int(self.segment_bytes[0])))
            return
        source, target, nbytes = self.pieces(0, 1)[0]
        for done in range(0, nbytes, piece_bytes):
            yield grid_of([Piece(source + done, target + done, min(piece_bytes, nbytes - done))])

    def _split_by_runs(self, rows: Rows, step: int) -> Iterator[Grid]:
        for run in range(0, int(self.unit_runs[0]), step):
            units = self.source_units + run * self.segment_bytes, self.target_units + run * self.segment_bytes
            part = rows._replace(first_runs=rows.first_runs + run)
            yield Grid(*self[:3], *units, numpy.minimum(self.unit_runs - run, step), part)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Segment by segment, unit by unit."""
        segment, unit = numpy.divmod(numpy.arange(start, stop), len(self.source_units))
        sources = self.source_bases[segment] + self.source_units[unit]
        targets = self.target_bases[segment] + self.target_units[unit]
        sizes = self.segment_bytes[segment] * self.unit_runs[unit]
        return list(map(Piece, sources.tolist(), targets.tolist(), sizes.tolist()))

    def windows(self) -> Iterator[list[Piece]]:
        """All pieces in order, WINDOW_PIECES at a time: what another process says in 64 KiB may be millions."""
        for start in range(0, self.num_pieces, WINDOW_PIECES):
            yield self.pieces(start, min(start + WINDOW_PIECES, self.num_pieces))


def grid_of(pieces: Sequence[Piece]) -> Grid:
    """Pieces that do not repeat: a segment each, of one unit. At least one."""
    sources, targets, sizes = numpy.array(pieces, dtype=numpy.int64).reshape(-1, 3).T.copy()
    return Grid(sources, targets, sizes, _ALONE, _ALONE, _ALONE + 1)


_ALONE = numpy.zeros(1, dtype=numpy.int64)


def _groups(sizes: Offsets, group_bytes: int, group_members: int) -> Iterator[slice]:
    """Of neighbours, as many as fit, and at least one."""
    ends, start = numpy.cumsum(sizes), 0
    while start < len(sizes):
        fitting = int(numpy.searchsorted(ends, group_bytes + (ends[start - 1] if start else 0), side="right"))
        stop = max(start + 1, min(fitting, start + group_members))
        yield slice(start, stop)
        start = stop


class TransferPlan(Sequence[Piece]):
    """Immutable. Reading it in order is cheap, from any thread."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self.grids = [grid for grid in grids if grid.num_pieces]
        self._firsts = [0, *itertools.accumulate(grid.num_pieces for grid in self.grids)]
        self._window: tuple[int, list[Piece]] = (0, [])  # replaced as a whole
        self.nbytes = sum(grid.nbytes for grid in self.grids)

    def fits(self, source_bytes: int, target_bytes: int) -> bool:
        """Every piece lies within memories of these sizes."""
        ends = [grid.ends() for grid in self.grids]
        return all(source <= source_bytes and target <= target_bytes for source, target in ends)

    def __len__(self) -> int:
        return self._firsts[-1]

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> list[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | list[Piece]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._expanded(start, max(start, stop))[::step] if step > 0 else list(self)[index]
        index += len(self) if index < 0 else 0
        if not 0 <= index < len(self):
            raise IndexError(index)
        first, window = self._window
        if not first <= index < first + len(window):
            first = index - index % WINDOW_PIECES
            window = self._expanded(first, min(first + WINDOW_PIECES, len(self)))
            self._window = first, window
        return window[index - first]

    def __iter__(self) -> Iterator[Piece]:
        for start in range(0, len(self), WINDOW_PIECES):
            yield from self._expanded(start, min(start + WINDOW_PIECES, len(self)))

    def _expanded(self, start: int, stop: int) -> list[Piece]:
        found: list[Piece] = []
        number = bisect.bisect_right(self._firsts, start) - 1
        while start < stop:
            first, grid = self._firsts[number], self.grids[number]
            end = min(stop, self._firsts[number + 1])
            found += grid.pieces(start - first, end - first)
            start, number = end, number + 1
        return found
