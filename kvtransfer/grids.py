"""Many pieces in few numbers: a plan is a list of grids, expanded a window at a time by whoever moves the bytes.

Between layouts that are cut unlike each other a block falls into a piece per layer, plane and head, and a long prompt
into millions. But they repeat from segment to segment: piece (s, u) of a grid goes

    from source_bases[s] + source_units[u]  to target_bases[s] + target_units[u],  segment_bytes[s] · unit_runs[u] bytes
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

WINDOW_PIECES = 4096  # expanded at a time


class Grid(NamedTuple):
    """In bytes, int64. Segments share the length, or units the number of runs: never do both differ."""

    source_bases: Offsets  # [S]
    target_bases: Offsets  # [S]
    segment_bytes: Offsets  # [S], of one run
    source_units: Offsets  # [U]
    target_units: Offsets  # [U]
    unit_runs: Offsets  # [U]

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

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """Segment by segment, unit by unit."""
        segment, unit = numpy.divmod(numpy.arange(start, stop), len(self.source_units))
        sources = self.source_bases[segment] + self.source_units[unit]
        targets = self.target_bases[segment] + self.target_units[unit]
        sizes = self.segment_bytes[segment] * self.unit_runs[unit]
        return list(map(Piece, sources.tolist(), targets.tolist(), sizes.tolist()))


class TransferPlan(Sequence[Piece]):
    """Immutable. Reading it in order is cheap, from any thread."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        self._grids = [grid for grid in grids if grid.num_pieces]
        self._firsts = [0, *itertools.accumulate(grid.num_pieces for grid in self._grids)]
        self._window: tuple[int, list[Piece]] = (0, [])  # replaced as a whole
        self.nbytes = sum(grid.nbytes for grid in self._grids)

    def fits(self, source_bytes: int, target_bytes: int) -> bool:
        """Every piece lies within memories of these sizes."""
        ends = [grid.ends() for grid in self._grids]
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
            first, grid = self._firsts[number], self._grids[number]
            end = min(stop, self._firsts[number + 1])
            found += grid.pieces(start - first, end - first)
            start, number = end, number + 1
        return found
