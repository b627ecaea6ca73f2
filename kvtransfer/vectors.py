"""The pieces of a grid as vectors, by which they are sent and received from where they lie: many in one call, with no
copy and no object of Python for a piece. Sockets take them by writev and readv of the C library, while other threads
run; libucp takes them as they are.

Addresses are of memory of this process that the caller holds, and has found long enough."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterator

import numpy
from numpy.typing import NDArray

from kvtransfer.grids import WINDOW_PIECES, Grid, Offsets

VECTORS = 1024  # of one system call: IOV_MAX
Vectors = NDArray[numpy.int64]  # [N, 2]: address and size of a struct iovec or a ucp_dt_iov_t, in bytes

_libc = ctypes.CDLL(None, use_errno=True)
for _function in (_libc.writev, _libc.readv):
    _function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    _function.restype = ctypes.c_ssize_t


def sources(part: Grid, source: int) -> Vectors:
    """All pieces of the part, in order."""
    return numpy.concatenate(list(_windows(part, source, part.source_bases, part.source_units)))


def send(link: socket.socket, part: Grid, source: int) -> None:
    """On a link that blocks. Raises OSError."""
    for vectors in _windows(part, source, part.source_bases, part.source_units):
        left = vectors
        while len(left):
            left = _behind(left, _called(_libc.writev, link, left))


def receive(link: socket.socket, part: Grid, target: int) -> Iterator[int]:
    """Bytes that each call received; 0, and no more, where the other side has ended the link. Raises OSError."""
    for vectors in _windows(part, target, part.target_bases, part.target_units):
        left = vectors
        while len(left):
            got_bytes = _called(_libc.readv, link, left)
            yield got_bytes
            if not got_bytes:
                return
            left = _behind(left, got_bytes)


def _windows(grid: Grid, address: int, bases: Offsets, units: Offsets) -> Iterator[Vectors]:
    for start in range(0, grid.num_pieces, WINDOW_PIECES):
        stop = min(start + WINDOW_PIECES, grid.num_pieces)
        segment, unit = numpy.divmod(numpy.arange(start, stop), len(units))
        vectors = numpy.empty((stop - start, 2), dtype=numpy.int64)
        vectors[:, 0] = address + bases[segment] + units[unit]
        vectors[:, 1] = grid.segment_bytes[segment] * grid.unit_runs[unit]
        yield vectors


def _called(function: ctypes._NamedFuncPointer, link: socket.socket, vectors: Vectors) -> int:
    while True:
        done_bytes: int = function(link.fileno(), vectors.ctypes.data, min(len(vectors), VECTORS))
        if done_bytes >= 0:
            return done_bytes
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _behind(vectors: Vectors, nbytes: int) -> Vectors:
    """What is left behind the first `nbytes`; the vectors are changed."""
    ends = numpy.cumsum(vectors[:VECTORS, 1])
    whole = int(numpy.searchsorted(ends, nbytes, side="right"))
    rest = nbytes - (int(ends[whole - 1]) if whole else 0)
    left = vectors[whole:]
    if rest:
        left[0, 0] += rest
        left[0, 1] -= rest
    return left
