"""Eight sums over rows of KV, of which a digest is made: in any order, where rows lie or while they are copied.

A row is what one (layer, plane, head, token) holds, as words d of 64 bits, padded with zeros to stripes s of eight
lanes j. All is modulo 2^64, k is XXH3's secret:

    A[j]  = Σ_s  low32(d[s,j] ^ k[s+j]) · high32(d[s,j] ^ k[s+j])  +  d[s, j^1]
    S[j] += (A[j] ^ A[j] >> 32) · f[j mod 2]

A is XXH3's accumulation (Collet, xxHash 0.8), with its scramble before the 17th stripe, the 33rd and so on. The odd
factors f are those of the row's place: x = splitmix64(layer · planes + plane, head, token), and x with its halves
swapped, both | 1. Each multiplied by a key of its own, terms may be added up in any order (multilinear hashing; Lemire
and Kaser 2014, "Strongly universal string hashing is fast"; here with keys from a generator). Nothing in it depends on
blocks, or on how layers, heads and tokens are cut.

What is missed: of one row alone, never a change within one word (d counts as it is, and the step to S is a bijection),
another change as XXH3's accumulation does, about one in 2^64 for each of the two or more lanes that it reaches. Of rows
that trade places, lane j is blind if 2^64 divides the difference of their A times that of their f, some 2^-58; lanes of
even and of odd number have factors of their own, and a word is in one of each: 2^-90 at worst, 2^-116 as a rule. It is
no defence against who makes up KV on purpose: the keys are known.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy
from numpy.typing import NDArray

from kernels.cpu.row_digest import shared_row_sums
from kernels.row_digest import BLOCK_STRIPES, PRIME, SECRET, STRIPE_BYTES
from kvtransfer.grids import Grid, Rows, Sums

_SECRET = numpy.array(SECRET, numpy.uint64)
_U = numpy.uint64


def no_rows() -> Sums:
    """S, and behind it how many bytes the rows have."""
    return numpy.zeros(9, numpy.uint64)


def add_rows(sums: Sums, grid: Grid, source: int) -> None:
    """The rows of the grid's sources, in memory at address `source` that the caller holds and has found long enough."""
    assert grid.rows is not None
    if (native := shared_row_sums()) is None:
        _add_portably(sums, grid, grid.rows, source)
    else:
        _call(native, sums, grid, grid.rows, source, None)


def copy_and_add_rows(grid: Grid, source: int, target: int) -> bool:
    """Copies all pieces, and adds the rows to the grid's own sums. False where there is no compiled code for it."""
    assert grid.rows is not None
    if (native := shared_row_sums()) is None:
        return False
    _call(native, grid.rows.sums, grid, grid.rows, source, target)
    return True


def _call(native: Any, sums: Sums, grid: Grid, rows: Rows, source: int, target: int | None) -> None:
    assert sums.dtype == numpy.uint64 and sums.shape == (9,)
    places = map(_address, grid[:6])
    source_bases, target_bases, segment_bytes, source_units, target_units, unit_runs = places
    native(
        *(_address(sums), source, target, source_bases, source_units, target_bases, target_units),
        *(segment_bytes, unit_runs, len(grid.source_bases), len(grid.source_units)),
        *(_address(rows.first_tokens), _address(rows.first_runs), rows.num_heads, rows.first_head, rows.row_bytes),
    )


def _address(column: NDArray[Any]) -> int:
    assert column.flags.c_contiguous
    address: int = column.__array_interface__["data"][0]
    return address


def _add_portably(sums: Sums, grid: Grid, rows: Rows, source: int) -> None:
    """Run by run of all segments: a copy of them is in a core's cache meanwhile."""
    for unit, runs in enumerate(grid.unit_runs.tolist()):
        for run in range(runs):
            plane, head = divmod(int(rows.first_runs[unit]) + run, rows.num_heads)
            place = plane << 48 | (rows.first_head + head) << 32
            starts = source + grid.source_bases + int(grid.source_units[unit]) + run * grid.segment_bytes
            for start, first_token, nbytes in zip(starts, rows.first_tokens, grid.segment_bytes, strict=True):
                held = numpy.ctypeslib.as_array((ctypes.c_uint8 * int(nbytes)).from_address(int(start)))
                _add_run(sums, held.reshape(-1, rows.row_bytes), place + int(first_token))


def _add_run(sums: Sums, run: NDArray[numpy.uint8], first_place: int) -> None:
    """run [rows, row_bytes]: the first is that of `first_place`, the next of the one behind it."""
    sums[:8] += terms(run, numpy.arange(len(run), dtype=_U) + _U(first_place)).sum(axis=0)
    sums[8] += _U(run.size)


def terms(rows: NDArray[numpy.uint8], places: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    """What rows [N, row_bytes] of these places [N] add to S, [N, 8]; a place is plane << 48 | head << 32 | token."""
    num_rows, row_bytes = rows.shape
    padded = numpy.zeros((num_rows, -(-row_bytes // STRIPE_BYTES) * STRIPE_BYTES), numpy.uint8)
    padded[:, :row_bytes] = rows
    words = padded.view("<u8").astype(_U, copy=False).reshape(num_rows, -1, 8)
    found = numpy.zeros((num_rows, 8), _U)
    for stripe in range(words.shape[1]):
        within = stripe % BLOCK_STRIPES
        if stripe and not within:
            found = (found ^ found >> _U(47) ^ _SECRET[16:]) * _U(PRIME)
        mixed = words[:, stripe] ^ _SECRET[within : within + 8]
        found += (mixed & _U(0xFFFFFFFF)) * (mixed >> _U(32)) + words[:, stripe, [1, 0, 3, 2, 5, 4, 7, 6]]
    even = _splitmix(places)
    odd = even << _U(32) | even >> _U(32)
    factors: NDArray[numpy.uint64] = numpy.stack([even, odd] * 4, axis=1) | _U(1)
    return (found ^ found >> _U(32)) * factors


def _splitmix(place: NDArray[numpy.uint64]) -> NDArray[numpy.uint64]:
    """Steele, Lea and Flood 2014."""
    place = place + _U(0x9E3779B97F4A7C15)
    place = (place ^ place >> _U(30)) * _U(0xBF58476D1CE4E5B9)
    place = (place ^ place >> _U(27)) * _U(0x94D049BB133111EB)
    return place ^ place >> _U(31)
