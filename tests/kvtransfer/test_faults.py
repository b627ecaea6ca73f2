"""Faults that a hand-over must survive: those that the reference transport plays, and a writer that lies."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import secrets
import socket
import time
import tracemalloc
from collections.abc import Iterator, Sequence

import pytest

import kvtransfer.sockets
import kvtransfer.sockets_peer
from kvtransfer.frames import receive_frame, send_frame
from kvtransfer.memory import Fault, FaultKind, MemoryTransport
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Piece
from legato.v1.transfer_pb2 import RegionDescriptor, SocketsAddress, TransferFrame
from spec.errors import TransferFailed

DATA = bytes(range(1, 201))


def played(fault: Fault) -> tuple[MemoryTransport, list[BaseException | None], bytes, list[bool]]:
    """Three posts of the same bytes to three places, the second of which meets the fault."""
    transport = MemoryTransport({1: fault})
    source, target = transport.register(200), transport.register(600)
    source.buffer[:] = DATA
    peer = transport.connect(transport.address, target.descriptor)
    failures: list[BaseException | None] = []
    alive = []
    for index in range(3):
        try:
            failures.append(peer.post(source, [Piece(0, 200 * index, 200)]).exception(timeout=5))
        except TransferFailed as error:
            failures.append(error)
        alive.append(peer.connected)
    landed = bytes(target.buffer)
    transport.close()
    assert transport.counts()["transfers"] == 0
    return transport, failures, landed, alive


def test_a_failed_transfer_may_have_landed_in_part() -> None:
    _, failures, landed, alive = played(Fault(FaultKind.FAIL))
    assert [type(failure) for failure in failures] == [type(None), TransferFailed, type(None)]
    assert landed == DATA + DATA[:100] + bytes(100) + DATA
    assert alive == [True, True, True]


def test_a_truncated_transfer_says_that_it_is_done() -> None:
    _, failures, landed, _ = played(Fault(FaultKind.TRUNCATE))
    assert failures == [None, None, None]
    assert landed == DATA + DATA[:100] + bytes(100) + DATA


def test_a_corrupt_transfer_differs_by_one_bit() -> None:
    _, failures, landed, _ = played(Fault(FaultKind.CORRUPT))
    assert failures == [None, None, None]
    differing = [a ^ b for a, b in zip(landed, DATA * 3, strict=True) if a != b]
    assert len(differing) == 1
    assert differing[0].bit_count() == 1
    assert landed[:200] == landed[400:] == DATA


def test_a_lost_peer_stays_lost() -> None:
    _, failures, landed, alive = played(Fault(FaultKind.LOSE_PEER))
    assert [type(failure) for failure in failures] == [type(None), TransferFailed, TransferFailed]
    assert landed == DATA + bytes(400)
    assert alive == [True, False, False]


def test_a_delayed_transfer_is_overtaken_and_still_lands() -> None:
    transport = MemoryTransport({0: Fault(FaultKind.DELAY, delay_s=0.2)})
    source, target = transport.register(200), transport.register(200)
    peer = transport.connect(transport.address, target.descriptor)
    source.buffer[:] = DATA
    late, early = peer.post(source, [Piece(0, 0, 100)]), peer.post(source, [Piece(0, 100, 100)])
    early.result(5)
    assert not late.done()
    assert bytes(target.buffer) == bytes(100) + DATA[:100]
    late.result(5)
    assert bytes(target.buffer) == DATA[:100] * 2
    transport.close()


def test_a_delayed_transfer_never_lands_after_release() -> None:
    transport = MemoryTransport({0: Fault(FaultKind.DELAY, delay_s=0.1)})
    source, target = transport.register(200), transport.register(200)
    source.buffer[:] = DATA
    peer = transport.connect(transport.address, target.descriptor)
    late = peer.post(source, [Piece(0, 0, 100)])
    peer.release()
    assert isinstance(late.exception(timeout=0), TransferFailed)
    time.sleep(0.15)
    assert bytes(target.buffer) == bytes(200)
    transport.close()


@pytest.fixture
def owner() -> Iterator[SocketsTransport]:
    transport = SocketsTransport()
    yield transport
    transport.close()


def attached(owner: SocketsTransport, descriptor: bytes) -> socket.socket:
    where = SocketsAddress.FromString(owner.address)
    link = socket.create_connection((where.tcp_host, where.tcp_port), timeout=5)
    token = RegionDescriptor.FromString(descriptor).token
    send_frame(link, TransferFrame(attach=TransferFrame.Attach(link_id=secrets.randbits(64), token=token)))
    answer = receive_frame(link)
    assert answer is not None
    assert not answer.attached.refused
    return link


def ends(link: socket.socket) -> bool:
    try:
        return receive_frame(link) is None
    except ConnectionError:
        return True


def write_of(
    target_bases: Sequence[int] = (0,),
    segment_bytes: Sequence[int] = (1,),
    target_units: Sequence[int] = (0,),
    unit_runs: Sequence[int] = (1,),
) -> TransferFrame.Write:
    return TransferFrame.Write(
        write_id=5,
        target_bases=target_bases,
        segment_bytes=segment_bytes,
        target_units=target_units,
        unit_runs=unit_runs,
    )


@pytest.mark.parametrize(
    "write",
    [
        write_of(target_bases=[1], segment_bytes=[64]),
        write_of(target_bases=[2**64 - 8], segment_bytes=[16]),
        write_of(target_bases=[0], segment_bytes=[2**40]),
        write_of(target_bases=[0, 1], segment_bytes=[1]),
        write_of(target_bases=[], segment_bytes=[]),
        write_of(segment_bytes=[0]),
        write_of(segment_bytes=[16], target_units=[0, 49], unit_runs=[1, 1]),
        write_of(segment_bytes=[16], target_units=[0, 2**63], unit_runs=[1, 1]),
        write_of(segment_bytes=[16], target_units=[0], unit_runs=[2**60]),
        write_of(segment_bytes=[16], unit_runs=[1, 1]),
        write_of(target_bases=[0, 0], segment_bytes=[1, 50], target_units=[0, 2], unit_runs=[1, 2]),
        write_of(target_bases=[0] * 100, segment_bytes=[1] * 100, target_units=[0] * 100, unit_runs=[1] * 100),
    ],
)
def test_a_writer_that_lies_about_its_place_is_cut_off(owner: SocketsTransport, write: TransferFrame.Write) -> None:
    region = owner.register(64)
    with attached(owner, region.descriptor) as link:
        send_frame(link, TransferFrame(write=write))
        link.sendall(b"\xaa" * 64)
        assert ends(link)
    assert bytes(region.buffer) == bytes(64)


@pytest.mark.parametrize("packed", [False, True])
def test_what_was_not_received_is_not_called_written(owner: SocketsTransport, packed: bool) -> None:
    """The region is released in the middle of a write, and the link is cut only after more of it came."""
    region = owner.register(64 << 10)
    number, piece_bytes = (8, 64) if packed else (1, 32 << 10)
    with attached(owner, region.descriptor) as link:
        bases = range(0, 2 * piece_bytes * number, 2 * piece_bytes)
        send_frame(link, TransferFrame(write=write_of(bases, [piece_bytes] * number)))
        link.sendall(b"x" * 100)
        (served,) = owner._links
        until_s = time.monotonic() + 5
        while not packed and bytes(region.buffer[:100]) != b"x" * 100 and time.monotonic() < until_s:
            time.sleep(0.001)
        served.is_ending = True  # what end() does first; the cut is what it does next
        link.sendall(b"x")
        answer = receive_frame(link)
        assert answer is not None
        assert answer.HasField("detach"), "the last word, and none of the write"
    region.release()


def test_a_small_frame_that_says_many_pieces_takes_little_memory(owner: SocketsTransport) -> None:
    side, piece_bytes = 256, 9
    data = random.Random(4).randbytes(side * side * piece_bytes)
    region = owner.register(len(data))
    units = [piece_bytes * number for number in range(side)]
    write = write_of([side * unit for unit in units], [piece_bytes] * side, units, [1] * side)
    with attached(owner, region.descriptor) as link:
        link.settimeout(60)
        tracemalloc.start()
        try:
            send_frame(link, TransferFrame(write=write))
            link.sendall(data)
            answer = receive_frame(link)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert answer is not None
    assert answer.HasField("written")
    assert bytes(region.buffer) == data
    assert peak_bytes < 8 << 20, "one view a piece would be some 16 MiB"


@pytest.mark.parametrize("noise", [b"\xff\xff\xff\x7f", b"\x04\0\0\0\xff\xff\xff\xff", b"GET / HTTP/1.1\r\n\r\n"])
def test_noise_instead_of_a_frame_ends_the_link_and_harms_no_other(owner: SocketsTransport, noise: bytes) -> None:
    region = owner.register(64)
    with attached(owner, region.descriptor) as good:
        with attached(owner, region.descriptor) as link:
            link.sendall(noise)
            assert ends(link)
        send_frame(good, TransferFrame(write=write_of(target_bases=[3], segment_bytes=[2])))
        good.sendall(b"ok")
        answer = receive_frame(good)
        assert answer is not None
        assert answer.written.write_id == 5
    assert bytes(region.buffer[3:5]) == b"ok"


def test_who_never_shows_a_token_is_cut_off_however_it_trickles(
    owner: SocketsTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvtransfer.sockets, "ATTACH_TIMEOUT_S", 0.3)
    where = SocketsAddress.FromString(owner.address)
    with socket.create_connection((where.tcp_host, where.tcp_port), timeout=5) as link:
        link.sendall((1 << 20).to_bytes(4, "little"))
        until_s = time.monotonic() + 10
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < until_s:
                link.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() < until_s
    assert not owner._links


def test_an_end_of_the_link_without_a_last_word_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the system gives up a link to an owner that is stuck: what it has received would still land."""
    writer = SocketsTransport()
    with socket.create_server(("127.0.0.1", 0)) as listener, concurrent.futures.ThreadPoolExecutor(1) as other:
        listener.settimeout(5)

        def answer(frame: TransferFrame | None = None) -> TransferFrame:
            with listener.accept()[0] as link:
                asked = receive_frame(link)
                assert asked is not None
                send_frame(link, frame or asked)
                return asked

        where = SocketsAddress(tcp_host="127.0.0.1", tcp_port=listener.getsockname()[1])
        attached = TransferFrame.Attached(region_bytes=8)
        attaching = other.submit(answer, TransferFrame(attached=attached))
        peer = writer.connect(where.SerializeToString(), RegionDescriptor(token=b"?").SerializeToString())
        monkeypatch.setattr(kvtransfer.sockets_peer, "QUIET_TIMEOUT_S", 0.3)
        for _ in range(2):  # it ends the link, and does not answer
            with pytest.raises(TransferFailed, match="confirm"):
                peer.release()
        for _ in range(2):
            listener.accept()[0].close()  # the questions it slept through
        monkeypatch.setattr(kvtransfer.sockets_peer, "QUIET_TIMEOUT_S", 5.0)
        asking = other.submit(answer)
        peer.release()
        assert asking.result(5).detach.link_id == attaching.result(5).attach.link_id
    assert writer.counts()["peers"] == 0
    writer.close()
