"""A part of a plan as the Write that announces it on the wire, and what its owner makes of it."""

from __future__ import annotations

import ctypes
import sys

import numpy

from kvtransfer.grids import Grid, TransferPlan
from legato.v1.transfer_pb2 import TransferFrame
from spec.errors import TransferFailed

PART_BYTES = 4 << 20  # of one Write of several pieces
GROUP_NUMBERS = 4096  # segments and units of one Write, together


def parts(plan: TransferPlan, max_encoded_bytes: int = 1 << 20, max_piece_bytes: int = sys.maxsize) -> list[Grid]:
    """What goes as one Write each, encoded in no more bytes than that, with no piece longer than that."""
    numbers = min(GROUP_NUMBERS, (max_encoded_bytes - 64) // 16)  # a place and a size of eight bytes each
    assert numbers >= 2
    return [part for grid in plan.grids for part in grid.cut(max_piece_bytes, PART_BYTES, numbers)]


def announced(part: Grid, write_id: int, *, link_id: int | None = None, more: bool = False) -> TransferFrame.Write:
    return TransferFrame.Write(
        write_id=write_id,
        link_id=link_id,
        more=more,
        target_bases=part.target_bases.tolist(),
        segment_bytes=part.segment_bytes.tolist(),
        target_units=part.target_units.tolist(),
        unit_runs=part.unit_runs.tolist(),
    )


def landing_of(write: TransferFrame.Write, region_bytes: int) -> Grid:
    """Where the bytes belong, as targets of a grid. Raises TransferFailed for a Write that is none, or that reaches
    beyond the region: it comes from another process."""
    bases, sizes = list(write.target_bases), list(write.segment_bytes)
    units, runs = list(write.target_units), list(write.unit_runs)
    is_grid = 0 < len(bases) == len(sizes) and 0 < len(units) == len(runs) and min(*sizes, *runs) > 0
    if not is_grid or len(bases) + len(units) > GROUP_NUMBERS or (len(set(sizes)) > 1 and len(set(runs)) > 1):
        raise TransferFailed("a write that is none")
    is_one = len(bases) == len(units) == 1
    limit_bytes = region_bytes if is_one else min(region_bytes, PART_BYTES)
    if max(*bases, *units) > region_bytes or sum(sizes) * sum(runs) > limit_bytes:
        raise TransferFailed("a write outside the region, or of too much at once")
    segments = numpy.array((bases, sizes), dtype=numpy.int64)
    places = numpy.array((units, runs), dtype=numpy.int64)
    grid = Grid(segments[0], segments[0], segments[1], places[0], places[0], places[1])
    if grid.ends()[1] > region_bytes:
        raise TransferFailed("a write outside the region")
    return grid


def address_of(memory: memoryview | bytearray) -> tuple[int, object]:
    """(where it begins, what keeps it there). Writable memory alone has an address."""
    held = ctypes.c_ubyte.from_buffer(memory)
    return ctypes.addressof(held), held
