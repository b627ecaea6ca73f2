"""The pieces of a grid copied from memory to memory, or from a buffer in which they lie packed, one behind the other.
Addresses are of memory of this process that the caller holds, and has found long enough.

From memory to memory they go past the caches, and rows are digested on their way where the grid says which they are."""

from __future__ import annotations

import ctypes
import itertools

from kernels.cpu.copy_grid import BRIEF_BYTES, Addresses, shared_copy
from kvtransfer.grids import Grid, Offsets
from kvtransfer.row_sums import add_rows, copy_and_add_rows

_copy_briefly, _copy_at_length = ctypes.PyDLL(None).memmove, ctypes.CDLL(None).memmove
for _function in (_copy_briefly, _copy_at_length):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    _function.restype = ctypes.c_void_p

_PACKED: Addresses = (None, None)


def copy(grid: Grid, source: int, target: int) -> None:
    """Also adds the rows that the grid names to its sums."""
    if grid.rows is not None:
        if copy_and_add_rows(grid, source, target):
            return
        add_rows(grid.rows.sums, grid, source)
    if not _copied_natively(grid, source, target, (_address(grid.source_bases), _address(grid.source_units))):
        for source_offset, target_offset, nbytes in itertools.chain.from_iterable(grid.windows()):
            _memmove(target + target_offset, source + source_offset, nbytes)


def scatter(grid: Grid, packed: int, target: int) -> None:
    if not _copied_natively(grid, packed, target, _PACKED):
        for _, target_offset, nbytes in itertools.chain.from_iterable(grid.windows()):
            _memmove(target + target_offset, packed, nbytes)
            packed += nbytes


def _memmove(target: int, source: int, nbytes: int) -> None:
    (_copy_briefly if nbytes <= BRIEF_BYTES else _copy_at_length)(target, source, nbytes)


def _copied_natively(grid: Grid, source: int, target: int, sources: Addresses) -> bool:
    """False where it is one piece that stays in the caches, or there is no compiled copy."""
    if (grid.num_pieces == 1 and sources is _PACKED) or (native := shared_copy()) is None:
        return False
    targets = _address(grid.target_bases), _address(grid.target_units)
    sizes = _address(grid.segment_bytes), _address(grid.unit_runs)
    native(source, target, sources, targets, sizes, len(grid.source_bases), len(grid.source_units), grid.nbytes)
    return True


def _address(column: Offsets) -> int:
    assert column.flags.c_contiguous
    address: int = column.__array_interface__["data"][0]
    return address
