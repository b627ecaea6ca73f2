"""What libucp cannot carry in one message, which it does not look at by itself: it fails by type, and only itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import psutil
import pytest

import kvtransfer.ucx
import kvtransfer.ucx_peer
from kvtransfer.pieces import pages
from kvtransfer.transport import Peer, Piece, Region
from kvtransfer.ucx import UcxTransport
from kvtransfer.writes import parts
from legato.v1.transfer_pb2 import RegionDescriptor, TransferFrame
from spec.errors import TransferFailed

NBYTES = 64 << 10


@pytest.fixture
def near() -> Iterator[UcxTransport]:
    transport = UcxTransport()
    yield transport
    transport.close()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[UcxTransport]:
    monkeypatch.setattr(kvtransfer.ucx, "QUIET_TIMEOUT_S", 0.3)  # the last word of a link that was lost never comes
    transport = UcxTransport()
    yield transport
    transport.close()


@pytest.fixture
def region(far: UcxTransport) -> Region:
    return far.register(NBYTES, pages(NBYTES))  # given memory is not shared: it is written by messages


def writes(near: UcxTransport, peer: Peer, region: Region, pieces: list[Piece]) -> bool:
    source = near.register(NBYTES)
    source.buffer[:] = bytes(range(1, 129)) * (NBYTES // 128)
    peer.post(source, pieces).result(10)
    return all(region.buffer[to : to + nbytes] == source.buffer[start : start + nbytes] for start, to, nbytes in pieces)


@pytest.mark.parametrize("token", [b"", b"t" * 15, b"t" * 17, b"t" * 20_000])
def test_a_token_that_is_none_is_not_sent(near: UcxTransport, far: UcxTransport, region: Region, token: bytes) -> None:
    peer = near.connect(far.address, region.descriptor)
    with pytest.raises(TransferFailed, match="not a descriptor of ucx"):
        near.connect(far.address, RegionDescriptor(token=token).SerializeToString())
    assert writes(near, peer, region, [Piece(5, 3, 100)])


def test_a_message_that_does_not_fit_loses_the_endpoint_alone(
    near: UcxTransport, far: UcxTransport, region: Region
) -> None:
    peer = near.connect(far.address, region.descriptor)
    worker, endpoint = near._worker, peer.endpoint  # type: ignore[attr-defined]
    refused = "x" * worker.max_header_bytes
    worker.call(lambda: worker.send(endpoint, TransferFrame(attached=TransferFrame.Attached(refused=refused))))
    assert "bytes of one message" in endpoint.lost
    assert not peer.connected
    with pytest.raises(TransferFailed, match="bytes of one message"):
        writes(near, peer, region, [Piece(0, 0, 1)])
    assert writes(near, near.connect(far.address, region.descriptor), region, [Piece(5, 3, 100)])


def test_a_write_whose_header_does_not_fit_fails_and_the_next_does_not(
    near: UcxTransport, far: UcxTransport, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = near.connect(far.address, region.descriptor)
    many = [Piece(7 * number, 7 * number, 3) for number in range(4000)]
    with monkeypatch.context() as patched:
        patched.setattr(kvtransfer.ucx_peer, "parts", lambda plan, *_limits: parts(plan))
        with pytest.raises(TransferFailed, match="the write failed"):
            writes(near, peer, region, many)
    assert writes(near, peer, region, many)


def test_a_message_that_cannot_be_taken_ends_nothing(
    near: UcxTransport, far: UcxTransport, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = near.connect(far.address, region.descriptor)
    on_frame = far._worker._on_frame

    def fails_once(frame: TransferFrame) -> None:
        monkeypatch.setattr(far._worker, "_on_frame", on_frame)
        raise AssertionError("a defect of ours")

    monkeypatch.setattr(far._worker, "_on_frame", fails_once)
    with pytest.raises(TransferFailed, match="does not answer"):
        near.connect(far.address, region.descriptor, timeout_s=0.3)
    assert writes(near, peer, region, [Piece(5, 3, 100)])


def test_memory_that_the_system_shares_no_segment_for_is_not_filled_ahead() -> None:
    """As where a segment of that size is refused: libucp would take a file of POSIX shared memory and fill it, until
    the host has none left."""
    nbytes = 64 << 20
    transport = UcxTransport(options={"TLS": "tcp,posix,self"})
    resident = psutil.Process().memory_info().rss
    region = transport.register(nbytes)
    address = numpy.frombuffer(region.buffer, numpy.uint8).ctypes.data
    with Path("/proc/self/maps").open() as maps:
        (line,) = [line for line in maps if _holds(line.split()[0], address)]
    assert len(line.split()) == 5, line  # of no file
    assert psutil.Process().memory_info().rss - resident < nbytes // 2
    region.release()
    transport.close()


def _holds(bounds: str, address: int) -> bool:
    start, end = (int(bound, 16) for bound in bounds.split("-"))
    return start <= address < end
