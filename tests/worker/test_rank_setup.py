"""Where a process stands among the ranks, and where each one's KV memory lies."""

from __future__ import annotations

import mmap

import pytest

from kvtransfer.probing import PROBE_BYTES
from service.config import EngineConfig
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout, ParallelLayout
from worker.kv_region import RankMemories
from worker.rank_setup import Place, options_for, place_from

LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}
NARROW = KVLayout(3, 1, 6, 7, Dtype.FLOAT16)  # 504 bytes a block
WIDE = KVLayout(5, 1, 6, 7, Dtype.FLOAT16)  # 840 bytes


def test_a_launcher_says_where_a_rank_stands() -> None:
    assert place_from(LAUNCHED, ParallelLayout(tp=2, pp=2)) == Place(3, 1, 2, ("10.0.0.7", 29501))
    assert place_from({"PATH": "/bin"}, ParallelLayout(tp=2)) == Place(local_ranks=2)


@pytest.mark.parametrize(
    "changes", [{"WORLD_SIZE": "8"}, {"RANK": "4"}, {"RANK": "x"}, {"MASTER_PORT": ""}, {"LOCAL_RANK": "one"}]
)
def test_a_launch_that_does_not_fit_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(InvalidConfiguration):
        place_from(LAUNCHED | changes, ParallelLayout(tp=2, pp=2))


def test_a_launch_that_lacks_something_is_refused() -> None:
    without = {name: value for name, value in LAUNCHED.items() if name != "MASTER_ADDR"}
    with pytest.raises(InvalidConfiguration, match="MASTER_ADDR"):
        place_from(without, ParallelLayout(tp=2, pp=2))


def test_cores_are_shared_out_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert options_for(EngineConfig(), Place(local_ranks=3)).threads == 2
    assert options_for(EngineConfig(), Place(local_ranks=9)).threads == 1
    assert options_for(EngineConfig(), Place()).threads is None
    assert options_for(EngineConfig(threads=5), Place(local_ranks=3)).threads == 5


def test_each_rank_has_a_part_of_the_region_that_begins_on_a_page() -> None:
    memory = RankMemories([NARROW, WIDE, NARROW], 9, shared=False)
    assert memory.sizes == [9 * 504, 9 * 840, 9 * 504]
    assert [offset % mmap.PAGESIZE for offset in memory.offsets] == [0, 0, 0]
    assert memory.offsets[2] + 9 * 504 <= memory.probe_offset == memory.nbytes - PROBE_BYTES
    memory.whole = memoryview(bytearray(memory.nbytes))
    for rank in range(3):
        memory.landing(rank).fill_(rank + 1)
    assert [float(memory.landing(rank).min()) for rank in range(3)] == [1.0, 2.0, 3.0]
    assert memory.landing(1).shape == (9, 5, 2, 1, 7, 6)
