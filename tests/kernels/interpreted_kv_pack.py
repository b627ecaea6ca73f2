"""The kernel that copies rows of KV against its reference, and its sums against the CPU's digest.

As interpreted.py, run by test_interpreter.py in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from kv_memories import COPIES, CORNER, GUARD_BYTES, PLAIN, Copy
from torch import Tensor

from kernels import kv_pack, tuning
from kvtransfer.digest import digest_of
from spec.dtype import Dtype


@pytest.fixture(autouse=True)
def poisoned_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that leaves no sums of its own leaves these."""
    plain = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *size, **options: plain(self, *size, **options).fill_(77))
    torch.manual_seed(0)


def check(copy: Copy) -> None:
    source, from_table, target, to_table, around = copy.memories()
    expected_around = around.clone()
    expected = expected_around[GUARD_BYTES:-GUARD_BYTES].view(target.dtype).view(target.shape)
    where = {"table_token": copy.table_token, "corner": CORNER}
    found = kv_pack.launch(source, from_table, target, to_table, copy.first, copy.count, **where)
    sums = kv_pack.reference(source, from_table, expected, to_table, copy.first, copy.count, **where)
    assert found is not None
    assert sums is not None
    if copy.target_dtype is Dtype.BFLOAT16 is not copy.source_dtype:  # the interpreter cuts off where it should round
        differing = around != expected_around
        torch.testing.assert_close(target, expected, rtol=2**-7, atol=0, equal_nan=True)
        assert differing.float().mean() < 0.3
    else:
        assert torch.equal(around, expected_around)
        assert torch.equal(found, sums)
    assert digest_of(found.numpy().view("u8")) == copy.digest(target, to_table)


@pytest.mark.parametrize("case", COPIES)
def test_rows_and_sums(case: str) -> None:
    check(COPIES[case])


@pytest.mark.parametrize("elements", [1, 64, 2048])
def test_a_tile_may_be_of_any_number_of_rows(elements: int) -> None:
    with tuning.choosing(lambda operation, shape: tuning.Config({"elements": elements}, 1, 1)):
        check(Copy(PLAIN._replace(layers=1), Dtype.FLOAT32, Dtype.FLOAT32, 3, 2))


def test_some_layers_and_heads_of_a_memory_lie_packed_and_go_back() -> None:
    held = torch.randint(-99, 99, (7, 5, 2, 4, 4, 6), dtype=torch.int16).view(torch.bfloat16)
    table, packed_table = torch.tensor([6, 2, 3, 0]), torch.arange(4)
    part = held[:, 1:4, :, 2:4]
    packed = held.new_zeros(4, 3, 2, 2, 4, 6)
    sums = kv_pack.launch(part, table, packed, packed_table, 2, 11, corner=CORNER)
    back = held.clone()
    back[table] = 0
    again = kv_pack.launch(packed, packed_table, back[:, 1:4, :, 2:4], table, 2, 11, corner=CORNER)
    assert sums is not None
    assert again is not None
    assert torch.equal(sums, again)
    slots = [(int(table[token // 4]), token % 4) for token in range(2, 13)]
    for block, slot in slots:
        assert torch.equal(
            back[block, 1:4, :, 2:4, slot].view(torch.int16), part[block, :, :, :, slot].view(torch.int16)
        )
        back[block, 1:4, :, 2:4, slot] = 0
    back_bytes = back[table].view(torch.int16)
    assert not back_bytes.any(), "more than the tokens was written"


def test_without_a_digest_rows_are_copied_alone() -> None:
    copy = Copy(PLAIN, Dtype.FLOAT16, Dtype.INT8, 3, 11)
    source, from_table, target, to_table, _ = copy.memories()
    expected = target.clone()
    assert kv_pack.launch(source, from_table, target, to_table, 3, 11) is None
    assert kv_pack.reference(source, from_table, expected, to_table, 3, 11) is None
    assert torch.equal(target, expected)
