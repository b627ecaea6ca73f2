"""What every transport checks before it moves a byte, and the memory it moves them in."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

from kvtransfer.grids import TransferPlan, grid_of
from kvtransfer.transport import Piece
from spec.errors import InvalidParameter


def check_pieces(pieces: Sequence[Piece], source_bytes: int, target_bytes: int) -> int:
    """Total bytes. Raises InvalidParameter naming the first piece that lies outside of either region."""
    if isinstance(pieces, TransferPlan) and len(pieces) and pieces.fits(source_bytes, target_bytes):
        return pieces.nbytes
    total_bytes = 0
    for source_offset, target_offset, nbytes in pieces:
        if nbytes < 1 or source_offset < 0 or target_offset < 0:
            raise InvalidParameter(
                f"({source_offset}, {target_offset}, {nbytes}) is no piece of memory", field="pieces"
            )
        if source_offset + nbytes > source_bytes:
            raise InvalidParameter(
                f"read [{source_offset}, {source_offset + nbytes}) of a region of {source_bytes} bytes", field="pieces"
            )
        if target_offset + nbytes > target_bytes:
            raise InvalidParameter(
                f"write [{target_offset}, {target_offset + nbytes}) of a region of {target_bytes} bytes", field="pieces"
            )
        total_bytes += nbytes
    if not total_bytes:
        raise InvalidParameter("are none", field="pieces")
    return total_bytes


def planned(pieces: Sequence[Piece]) -> TransferPlan:
    """What a transfer keeps for as long as it takes, whatever the caller does with his list."""
    return pieces if isinstance(pieces, TransferPlan) else TransferPlan([grid_of(pieces)])


def check_memory(nbytes: int, memory: memoryview | None) -> None:
    """Raises InvalidParameter unless `memory`, where it is given, is writable, contiguous and `nbytes` long."""
    if nbytes < 1:
        raise InvalidParameter(f"must be at least 1, is {nbytes}", field="nbytes")
    if memory is None:
        return
    if memory.readonly or not memory.c_contiguous:
        raise InvalidParameter("must be writable and contiguous", field="memory")
    if memory.nbytes != nbytes:
        raise InvalidParameter(f"holds {memory.nbytes} bytes, not {nbytes}", field="memory")


def pages(nbytes: int) -> memoryview:
    """`nbytes` of zeros, page aligned, taken from the system as they are first touched; freed with the last view."""
    return memoryview(mmap.mmap(-1, nbytes))
