"""What a link is measured to do, and which is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtransfer.memory import Fault, FaultKind, MemoryTransport
from kvtransfer.probing import CLEARLY, PROBE_BYTES, Measured, is_rdma, measure, ranked, rdma_devices
from spec.errors import TransferFailed


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({}, ["ucx", "sockets", "other"]),
        ({"ucx": 1e9, "sockets": 1.2e9, "other": 1e9}, ["ucx", "sockets", "other"]),
        ({"ucx": 1e9, "sockets": 3e9, "other": 1e9}, ["sockets", "ucx", "other"]),
        ({"ucx": 1e9, "sockets": 3e9, "other": 9e9}, ["other", "sockets", "ucx"]),
        ({"sockets": 3e9, "other": 9e9}, ["ucx", "other", "sockets"]),
    ],
)
def test_order_holds_but_for_what_is_clearly_faster(rates: dict[str, float], expected: list[str]) -> None:
    measured = {name: Measured(1e-5, rate) for name, rate in rates.items()}
    assert ranked(["ucx", "sockets", "other"], measured) == expected


def test_a_slow_answer_counts_as_well() -> None:
    quick, slow = Measured(1e-5, 1e9), Measured(0.05, 1e9)
    assert ranked(["a", "b"], {"a": slow, "b": quick}) == ["b", "a"]
    assert slow.time_s(4 << 20) > CLEARLY * quick.time_s(4 << 20)


def test_a_probe_writes_where_it_is_told_and_fails_by_type() -> None:
    owner = MemoryTransport()
    near = MemoryTransport({8: Fault(FaultKind.LOSE_PEER)})
    source, target = near.register(PROBE_BYTES + 8), owner.register(PROBE_BYTES + 8)
    source.buffer[:] = b"\xaa" * source.buffer.nbytes
    peer = near.connect(owner.address, target.descriptor)
    found = measure(peer, source, 8, 8)
    assert found.latency_s > 0
    assert found.bytes_per_s > 0
    assert bytes(target.buffer[:8]) == bytes(8)
    with pytest.raises(TransferFailed, match="lost"):
        measure(peer, source, 8, 8)
    near.close()
    owner.close()


def test_rdma_is_known_by_devices_and_by_what_libucp_runs_over(tmp_path: Path) -> None:
    assert rdma_devices(tmp_path / "none") == []
    (tmp_path / "mlx5_1").mkdir()
    (tmp_path / "mlx5_0").mkdir()
    assert rdma_devices(tmp_path) == ["mlx5_0", "mlx5_1"]
    assert is_rdma("tcp, rc_mlx5")
    assert not is_rdma("tcp, sysv")
