"""The tables of tiles, and which of them a device takes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels import tuning
from kernels.tuning import SHARED_BYTES

TEXT = """
measured = ""

[[row]]
when = { dim = [65, 128], only_decodes = true }
tiles = { rows = 16 }
num_warps = 4
num_stages = 2

[[row]]
when = { dim = [129, inf] }
tiles = { rows = 32 }
num_warps = 8
num_stages = 3

[[row]]
tiles = { rows = 64 }
num_warps = 8
num_stages = 4
"""


@pytest.mark.parametrize(
    ("dim", "only_decodes", "expected"),
    [(64, True, 2), (65, True, 0), (128, 1, 0), (129, True, 1), (100, False, 2), (10**9, False, 1)],
)
def test_the_first_row_that_a_shape_meets_is_taken(dim: int, only_decodes: bool, expected: int) -> None:
    table = tuning.read(TEXT, "some", 80)
    assert table.index({"dim": dim, "only_decodes": only_decodes}) == expected


def test_a_table_that_is_written_is_read_again() -> None:
    tables = [tuning.table(name, architecture) for name in tuning.operations() for architecture in SHARED_BYTES]
    for table in [*tables, tuning.read(TEXT, "some", 80)]:
        assert tuning.read(tuning.write(table), table.operation, table.architecture) == table


@pytest.mark.parametrize(
    "broken",
    [
        TEXT.replace("[129, inf]", "[129, 128]"),
        TEXT.replace("num_warps = 4", "num_warps = 0"),
        TEXT.replace("num_stages = 2", "num_stage = 2"),
        TEXT.replace("num_stages = 2", "num_stages = 2\nspeed = 1"),
        TEXT.replace("rows = 64", "columns = 64"),
        TEXT.replace("[[row]]\ntiles", "[[row]]\nwhen = { dim = 1 }\ntiles"),  # not every shape has a row
        TEXT.replace('measured = ""', "measured = 1"),
        TEXT.replace('measured = ""', ""),
        'measured = ""',
        "row",
    ],
)
def test_what_is_no_table_is_refused(broken: str) -> None:
    with pytest.raises(ValueError, match=r"some\.sm_80"):
        tuning.read(broken, "some", 80)


@pytest.mark.parametrize(
    ("capability", "shared_kib", "expected"),
    [
        *((75, 64, 80), (80, 163, 80), (86, 99, 80), (89, 99, 80), (90, 227, 90)),
        *((100, 227, 100), (103, 227, 100), (110, 227, 100), (120, 99, 80)),  # as NVIDIA's programming guide has them
    ],
)
def test_a_device_takes_the_highest_architecture_that_fits(capability: int, shared_kib: int, expected: int) -> None:
    assert tuning.architecture_of(capability, shared_kib * 1024) == expected


def test_an_operation_without_a_table_takes_the_nearest_lower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.table.cache_clear()
    for architecture, stages in ((80, 4), (90, 5)):
        text = TEXT.replace("num_stages = 4", f"num_stages = {stages}")
        (tuning.FOLDER / f"some.sm_{architecture}.toml").write_text(text)
    try:
        assert [tuning.table("some", architecture).rows[-1].config.num_stages for architecture in (80, 90, 100)] == [
            *(4, 5, 5)
        ]
        with pytest.raises(ValueError, match="no table"):
            tuning.table("other", 100)
    finally:
        tuning.table.cache_clear()


def test_who_chooses_is_put_back() -> None:
    cpu = torch.device("cpu")
    before = tuning.choose("rms_norm", cpu, columns=64)
    other = dataclasses.replace(before, num_warps=32)
    with tuning.choosing(lambda operation, shape: other):
        assert tuning.choose("rms_norm", cpu, columns=64) is other
    assert tuning.choose("rms_norm", cpu, columns=64) == before
