"""Pieces sent and received from where they lie, against NumPy's own copies: many to a call, calls that end anywhere."""

from __future__ import annotations

import socket
import threading

import numpy
import pytest

from kvtransfer import vectors
from kvtransfer.grids import Grid, grid_of
from kvtransfer.transport import Piece
from kvtransfer.writes import address_of


def odd_grid() -> Grid:
    """5,250 pieces of 3 to 123 bytes, more than a system call and a window take; the target is cut another way."""
    segments, units = 42, 125
    runs = numpy.arange(units, dtype=numpy.int64) % 41 + 1
    sizes = numpy.full(segments, 3, dtype=numpy.int64)
    source_units = numpy.arange(units, dtype=numpy.int64)[::-1] * 127
    target_units = numpy.arange(units, dtype=numpy.int64) * segments * 131
    source_bases = numpy.arange(segments, dtype=numpy.int64) * units * 127
    target_bases = numpy.arange(segments, dtype=numpy.int64) * 131
    return Grid(source_bases, target_bases, sizes, source_units.copy(), target_units, runs)


@pytest.mark.parametrize("grid", [odd_grid(), grid_of([Piece(7, 600_000, 431)])], ids=["many", "one"])
def test_every_byte_lands_once_and_no_other_is_touched(grid: Grid) -> None:
    source = bytearray(numpy.random.default_rng(6).integers(1, 256, 700_000, dtype=numpy.uint8).tobytes())
    target, expected = bytearray(700_000), bytearray(700_000)
    for start, end, nbytes in grid.pieces(0, grid.num_pieces):
        expected[end : end + nbytes] = source[start : start + nbytes]
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 6_000)  # so that calls end within pieces
    with near, far:
        writer = threading.Thread(target=vectors.send, args=(near, grid, address_of(source)[0]))
        writer.start()
        received = list(vectors.receive(far, grid, address_of(target)[0]))
        writer.join()
    assert sum(received) == grid.nbytes
    assert target == expected


def test_the_end_of_the_link_is_said_and_a_broken_one_raises() -> None:
    grid, memory = odd_grid(), bytearray(700_000)
    near, far = socket.socketpair()
    with near:
        near.sendall(bytes(431))
        near.shutdown(socket.SHUT_WR)
        with far:
            received = list(vectors.receive(far, grid, address_of(memory)[0]))
        assert sum(received) == 431
        assert received[-1] == 0
        with pytest.raises(BrokenPipeError):
            vectors.send(near, grid, address_of(memory)[0])
