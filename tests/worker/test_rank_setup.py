"""Where a process stands among the ranks, and where each one's KV memory lies."""

from __future__ import annotations

import mmap

import pytest

from kvtransfer.probing import PROBE_BYTES
from service.config import EngineConfig
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout, ParallelLayout
from worker.kv_region import HostRegion, KVPlaces
from worker.rank_setup import Place, host_numbers, keepers_of, options_for, place_from

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
    places = KVPlaces([NARROW, WIDE, NARROW], 9, (0, 0, 0))
    assert places.sizes == [9 * 504, 9 * 840, 9 * 504]
    assert [offset % mmap.PAGESIZE for offset in places.offsets] == [0, 0, 0]
    assert places.offsets[2] + 9 * 504 <= places.probe_offsets[0] == places.region_bytes[0] - PROBE_BYTES
    region = HostRegion(places.region_bytes[0], shared=False)
    region.whole = memoryview(bytearray(region.nbytes))
    for rank in range(3):
        region.landing(places, rank).fill_(rank + 1)
    assert [float(region.landing(places, rank).min()) for rank in range(3)] == [1.0, 2.0, 3.0]
    assert region.landing(places, 1).shape == (9, 5, 2, 1, 7, 6)


def test_each_host_has_a_region_of_its_ranks_alone() -> None:
    hosts = host_numbers(["b", "a", "b", "a"])
    assert hosts == (0, 1, 0, 1)
    assert keepers_of(hosts) == (0, 1)
    assert keepers_of(host_numbers(["b", "b", "c", "a", "c"])) == (0, 2, 3)
    places = KVPlaces([NARROW, WIDE, WIDE, NARROW], 9, hosts)
    alone = KVPlaces([WIDE, NARROW], 9, (0, 0))
    assert [places.offsets[1], places.offsets[3]] == alone.offsets
    assert [places.region_bytes[1], places.probe_offsets[1]] == [alone.region_bytes[0], alone.probe_offsets[0]]
