"""The portable copy of KV rows against one written out row by row, and its sums against the CPU's digest."""

from __future__ import annotations

import itertools

import pytest
import torch
from kv_memories import COPIES, CORNER

from kernels.kv_pack import copy_rows
from kernels.kv_rows import convert_rows
from kvtransfer.digest import digest_of


@pytest.mark.parametrize("case", COPIES)
def test_rows_and_sums(case: str) -> None:
    torch.manual_seed(0)
    copy = COPIES[case]
    source, from_table, target, to_table, around = copy.memories()
    before = around.clone()
    where = {"table_token": copy.table_token, "corner": CORNER}
    sums = copy_rows(source, from_table, target, to_table, copy.first, copy.count, **where)
    assert sums is not None
    assert digest_of(sums.numpy().view("u8")) == copy.digest(target, to_table)
    around_again, after = around.clone(), target.view(torch.uint8)
    row_bytes = after.shape[5]
    for token, layer, plane, head in itertools.product(
        range(copy.first, copy.end), *(range(size) for size in target.shape[1:4])
    ):
        block, slot = divmod(token - copy.table_token, source.shape[4])
        row = source[from_table[block], layer, plane, head, slot]
        block, slot = divmod(token - copy.table_token, target.shape[4])
        place = after[int(to_table[block]), layer, plane, head, slot]
        assert torch.equal(place, convert_rows(row, target.dtype).view(torch.uint8))
        offset = place.storage_offset()
        around_again[offset : offset + row_bytes] = before[offset : offset + row_bytes]
    assert torch.equal(around_again, before), "more than the tokens was written"


def test_sums_say_where_a_row_is_and_what_it_holds() -> None:
    memory, table = torch.randn(3, 2, 2, 2, 4, 6), torch.tensor([2, 0])

    def sums_of(first: int = 1, count: int = 5, **where: object) -> list[int]:
        found = copy_rows(memory, table, torch.zeros(2, 2, 2, 2, 4, 6), torch.arange(2), first, count, **where)
        assert found is not None
        return found.tolist()

    plain = sums_of(corner=CORNER)
    assert sums_of(corner=CORNER) == plain
    others = [
        sums_of(corner=CORNER._replace(layer=6)),
        sums_of(corner=CORNER._replace(head=3)),
        sums_of(first=2, corner=CORNER),
        sums_of(first=5, table_token=4, corner=CORNER),
    ]
    memory[2, 1, 1, 1, 3, 5] += 1
    others.append(sums_of(corner=CORNER))
    for other in others:
        assert other[:8] != plain[:8]
        assert other[8] == plain[8] == 5 * 8 * 24
