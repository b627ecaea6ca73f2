"""Grids cut into parts, copied and scattered, against pieces that NumPy copies one by one."""

from __future__ import annotations

import random

import numpy
import pytest
from handoff_cases import draw_case

from kvtransfer import copying
from kvtransfer.copying import copy, scatter
from kvtransfer.grids import Grid, TransferPlan, grid_of
from kvtransfer.routes import HandoffPlan
from kvtransfer.transport import Piece
from kvtransfer.writes import address_of, announced, landing_of


def plan_of(seed: int) -> TransferPlan:
    case = draw_case(seed)
    ranks = [side.worker.of_group(side.group) for side in (case.source, case.target)]
    blocks = case.source.blocks, case.target.blocks
    return HandoffPlan(ranks[0], blocks[0], ranks[1], blocks[1], case.first_token, case.num_tokens).of()


def noise(nbytes: int, seed: int) -> numpy.ndarray:
    return numpy.random.default_rng(seed).integers(0, 256, nbytes, dtype=numpy.uint8)


@pytest.fixture(params=["compiled", "one by one"])
def _native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "one by one":
        monkeypatch.setattr(copying, "shared_copy", lambda: None)
    else:
        assert copying.shared_copy() is not None


@pytest.mark.usefixtures("_native")
@pytest.mark.parametrize("seed", range(40))
def test_every_way_moves_what_the_pieces_say(seed: int) -> None:
    plan = plan_of(seed)
    source = noise(max(piece.source_offset + piece.nbytes for piece in plan), 1)
    size = max(piece.target_offset + piece.nbytes for piece in plan)
    expected = noise(size, 2)
    for source_offset, target_offset, nbytes in plan:
        expected[target_offset:][:nbytes] = source[source_offset:][:nbytes]
    copied, scattered = noise(size, 2), noise(size, 2)
    for grid in plan.grids:
        copy(grid, source.ctypes.data, copied.ctypes.data)
        pieces = grid.pieces(0, grid.num_pieces)
        packed = bytearray(b"".join(source[at:][:nbytes].tobytes() for at, _, nbytes in pieces))
        scatter(grid, address_of(packed)[0], scattered.ctypes.data)
    numpy.testing.assert_array_equal(copied, expected)
    numpy.testing.assert_array_equal(scattered, expected)


def joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours that touch on both sides as one."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and (last.source_offset + last.nbytes, last.target_offset + last.nbytes) == piece[:2]:
            found[-1] = last._replace(nbytes=last.nbytes + piece.nbytes)
        else:
            found.append(piece)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_parts_are_the_same_bytes_in_the_same_order_and_small_enough(seed: int) -> None:
    draw = random.Random(seed)
    piece_bytes, group_bytes, group_numbers = draw.choice([(7, 7, 3), (64, 16, 5), (400, 100, 1000), (9, 900, 2)])
    for grid in plan_of(seed).grids:
        parts = list(grid.cut(piece_bytes, group_bytes, group_numbers))
        whole, cut = grid.pieces(0, grid.num_pieces), [p for part in parts for p in part.pieces(0, part.num_pieces)]
        assert joined(cut) == joined(whole)
        for part in parts:
            assert part.num_pieces == 1 or len(part.source_bases) + len(part.source_units) <= group_numbers
            assert part.nbytes <= (group_bytes if part.num_pieces > 1 else piece_bytes)


@pytest.mark.parametrize("seed", range(20))
def test_an_owner_reads_from_a_write_where_its_bytes_belong(seed: int) -> None:
    plan = plan_of(seed)
    region_bytes = max(piece.target_offset + piece.nbytes for piece in plan)
    for grid in plan.grids:
        for part in grid.cut(1 << 20, 1 << 19, 4096):
            found = landing_of(announced(part, 1), region_bytes)
            assert targets(found) == targets(part)


def targets(grid: Grid) -> list[tuple[int, int]]:
    return [piece[1:] for piece in grid.pieces(0, grid.num_pieces)]


def test_pieces_that_do_not_repeat_are_a_grid_too() -> None:
    pieces = [Piece(5, 900, 3), Piece(0, 4, 1), Piece(77, 0, 2)]
    assert grid_of(pieces).pieces(0, 3) == pieces
