"""One conformance suite for every transport. `memory` is the specification; the others run between two processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

import kvtransfer.sockets_peer
import kvtransfer.ucx_peer
from kvtransfer.grids import WINDOW_PIECES
from kvtransfer.plan import RankKV, plan_transfer
from kvtransfer.transport import LINK_IN_USE, Piece, Transport
from legato.v1.transfer_pb2 import SocketsAddress, UcxAddress
from spec.dtype import Dtype
from spec.errors import InvalidParameter, TransferFailed
from spec.layout import KVLayout

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KINDS = ["memory", "sockets", "sockets-tcp", "ucx", "ucx-tcp", "ucx-given"]
PROCESSES = [kind for kind in KINDS if kind != "memory"]
MIB = 1 << 20


def _far_worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("far_worker", HERE / "far_worker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


far_worker = _far_worker_module()


class OtherProcess:
    def __init__(self, kind: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(HERE / "far_worker.py"), kind]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def do(self, verb: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"verb": verb, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise TransferFailed(answer["error"])
        return answer["result"]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """Its last word is a clean exit, unless it was killed."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.wait(timeout=20)
        assert code in (0, -signal.SIGKILL), f"the far worker ended with {code}"


_far_processes: dict[str, OtherProcess] = {}


def _far_process(kind: str) -> OtherProcess:
    """One process serves many tests of a kind, with a new transport for each; a test that kills it gets a new one."""
    known = _far_processes.get(kind)
    if known is None or known.process.poll() is not None:
        known = _far_processes[kind] = OtherProcess(kind)
    return known


@pytest.fixture(scope="module", autouse=True)
def _end_far_processes() -> Iterator[None]:
    yield
    for far in _far_processes.values():
        far.end()


class SameProcess:
    def __init__(self, kind: str) -> None:
        self.worker = far_worker.FarWorker(kind)

    def do(self, verb: str, **arguments: Any) -> Any:
        return getattr(self.worker, verb)(**arguments)


class Pair:
    """A near transport and a far worker of the same kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.near: Transport = far_worker.open_transport(kind)
        self.far: Any = SameProcess(kind) if kind == "memory" else _far_process(kind)

    def address(self) -> bytes:
        address = bytes.fromhex(self.far.do("address"))
        if self.kind == "sockets-tcp":
            over_tcp = SocketsAddress.FromString(address)
            over_tcp.unix_path = ""
            return over_tcp.SerializeToString()
        return address

    def far_region(self, nbytes: int) -> bytes:
        return bytes.fromhex(self.far.do("register", nbytes=nbytes, given=self.kind == "ucx-given"))

    def connected(self, nbytes: int) -> tuple[Any, Any]:
        """(source region filled with noise, peer of a far region of the same size)"""
        source = self.near.register(nbytes)
        source.buffer[:] = random.Random(nbytes).randbytes(nbytes)
        return source, self.near.connect(self.address(), self.far_region(nbytes))


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.near.close()
    counts = [made.near.counts()]
    if made.kind == "memory" or made.far.process.poll() is None:
        counts.append(made.far.do("start_afresh"))
    for count in counts:
        assert (count["regions"], count["peers"], count["transfers"]) == (0, 0, 0)


only_processes = pytest.mark.parametrize("pair", PROCESSES, indirect=True)


def digest(data: Any) -> str:
    return hashlib.blake2b(data).hexdigest()


def _threads_of(pid: int) -> list[int]:
    return [thread.id for thread in psutil.Process(pid).threads() if sys.platform == "linux"]


def eventually(condition: Any, timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.01)


@pytest.mark.parametrize("nbytes", [1, 431, 64 * 1024 + 7, 9 * MIB + 3])
def test_content_is_exact(pair: Pair, nbytes: int) -> None:
    source, peer = pair.connected(nbytes)
    peer.post(source, [Piece(0, 0, nbytes)]).result(20)
    assert pair.far.do("digest") == digest(source.buffer)
    assert pair.near.counts()["written_bytes"] == nbytes


def test_scattered_pieces_land_where_they_belong_and_nowhere_else(pair: Pair) -> None:
    nbytes = 3 * MIB
    source, peer = pair.connected(nbytes)
    draw = random.Random(5)
    expected = bytearray(nbytes)
    slots = list(range(0, nbytes - 512, 512))
    draw.shuffle(slots)
    pieces = []
    for slot in slots[:5000]:  # more pieces than one frame, one message or one slice takes
        size = draw.randint(1, 511)
        piece = Piece(draw.randrange(nbytes - size), slot, size)
        pieces.append(piece)
        expected[slot : slot + size] = source.buffer[piece.source_offset : piece.source_offset + size]
    peer.post(source, pieces).result(20)
    assert pair.far.do("digest") == digest(expected)


def test_a_plan_of_many_pieces_lands_as_planned(pair: Pair) -> None:
    """Between layouts that are cut unlike each other: more pieces than are expanded at a time."""
    ours = RankKV(KVLayout(10, 1, 2, 4, Dtype.FLOAT16), range(10), range(2, 3))
    theirs = RankKV(KVLayout(9, 4, 2, 4, Dtype.FLOAT16), range(1, 10), range(4))
    blocks = random.Random(6).sample(range(300), 300)
    plan = plan_transfer(ours, blocks, theirs, range(300), 1, 1190)
    assert len(plan) > WINDOW_PIECES
    source, peer = pair.connected(300 * theirs.layout.block_bytes)
    expected = bytearray(source.buffer.nbytes)
    for source_offset, target_offset, nbytes in plan:
        expected[target_offset : target_offset + nbytes] = source.buffer[source_offset : source_offset + nbytes]
    peer.post(source, plan).result(20)
    assert pair.far.do("digest") == digest(expected)
    assert pair.near.counts()["written_bytes"] == plan.nbytes


def test_many_transfers_in_flight_over_two_peers(pair: Pair) -> None:
    nbytes = 2 * MIB
    source, first = pair.connected(nbytes)
    second = pair.near.connect(pair.address(), pair.far_region(nbytes))
    step = 8 * 1024
    transfers = [
        peer.post(source, [Piece(at, nbytes - step - at, step)])
        for at in range(0, nbytes, step)
        for peer in (first, second)
    ]
    done, late = concurrent.futures.wait(transfers, timeout=30)
    assert not late
    assert all(transfer.exception() is None for transfer in done)
    view = source.buffer
    mirrored = b"".join(view[at : at + step] for at in range(nbytes - step, -1, -step))
    for region in (0, 1):
        assert pair.far.do("digest", region=region) == digest(mirrored)
    first.release()
    assert pair.near.counts()["peers"] == 1
    second.post(source, [Piece(0, 0, nbytes)]).result(20)
    assert pair.far.do("digest", region=1) == digest(view)


@pytest.mark.parametrize(
    "piece",
    [Piece(0, 1, 4096), Piece(1, 0, 4096), Piece(-1, 0, 8), Piece(0, -8, 8), Piece(0, 0, 0), Piece(0, 0, -4)],
)
def test_a_piece_outside_either_region_is_refused(pair: Pair, piece: Piece) -> None:
    source, peer = pair.connected(4096)
    with pytest.raises(InvalidParameter, match="pieces"):
        peer.post(source, [Piece(0, 0, 16), piece])
    assert pair.far.do("digest") == digest(bytes(4096))


def test_no_pieces_are_refused(pair: Pair) -> None:
    source, peer = pair.connected(64)
    with pytest.raises(InvalidParameter):
        peer.post(source, [])


def test_a_wrong_descriptor_is_refused(pair: Pair) -> None:
    right = pair.far_region(64)
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), b"", b"\xff" * 18):
        with pytest.raises(TransferFailed):
            pair.near.connect(pair.address(), wrong)
    assert pair.near.counts()["peers"] == 0
    pair.near.connect(pair.address(), right).release()


def test_a_damaged_address_is_refused(pair: Pair) -> None:
    descriptor = pair.far_region(64)
    address = pair.address()
    wrong = [b"", b"\xff" * 40]
    if pair.near.name == "ucx":  # libucp would parse whatever it is given
        right = UcxAddress.FromString(address)
        for at in range(0, len(right.worker_address), 3):
            bent = bytearray(right.worker_address)
            bent[at] ^= 4
            wrong.append(
                UcxAddress(worker_address=bytes(bent), checksum=right.checksum, version="1").SerializeToString()
            )
        right.version = "1.1.0"
        wrong += [address[: len(address) // 2], right.SerializeToString()]
    for damaged in wrong:
        with pytest.raises(TransferFailed):
            pair.near.connect(damaged, descriptor, timeout_s=0.5)
    assert pair.near.counts()["peers"] == 0


def test_registering_nothing_or_what_cannot_be_written_is_refused(pair: Pair) -> None:
    for nbytes, memory in ((0, None), (-1, None), (8, memoryview(b"readonly")), (9, memoryview(bytearray(8)))):
        with pytest.raises(InvalidParameter):
            pair.near.register(nbytes, memory)


def test_given_memory_is_written_in_place(pair: Pair) -> None:
    mine = bytearray(100_003)
    region = pair.near.register(len(mine), memoryview(mine))
    pair.far.do("register", nbytes=len(mine))
    pair.far.do("connect", address=pair.near.address.hex(), descriptor=region.descriptor.hex())
    pair.far.do("post_noise", nbytes=len(mine), seed=3)
    assert bytes(mine) == random.Random(3).randbytes(len(mine))
    region.release()


def test_after_release_of_the_peer_a_post_fails_and_nothing_is_alive(pair: Pair) -> None:
    source, peer = pair.connected(4096)
    assert peer.connected
    peer.release()
    peer.release()
    assert not peer.connected
    with pytest.raises(TransferFailed):
        peer.post(source, [Piece(0, 0, 4096)])
    assert pair.near.counts()["peers"] == 0
    assert pair.far.do("digest") == digest(bytes(4096))


def test_after_release_of_the_region_a_write_fails_and_changes_nothing(pair: Pair) -> None:
    source, peer = pair.connected(4096)
    pair.far.do("release")
    pair.far.do("release")
    with pytest.raises(TransferFailed):
        peer.post(source, [Piece(0, 0, 4096)]).result(20)
    assert pair.far.do("read", offset=0, nbytes=4096) == bytes(4096).hex()
    eventually(lambda: not peer.connected)
    peer.release()
    assert pair.far.do("counts")["regions"] == 0


def test_release_of_a_peer_means_quiet(pair: Pair) -> None:
    nbytes = 8 * MIB
    source, peer = pair.connected(nbytes)
    transfers = [peer.post(source, [Piece(0, 0, nbytes)]) for _ in range(20)]
    peer.release()
    assert all(transfer.done() for transfer in transfers)
    before = pair.far.do("digest")
    time.sleep(0.1)
    assert pair.far.do("digest") == before
    assert pair.near.counts()["transfers"] == 0


def test_release_of_a_region_under_fire_means_quiet(pair: Pair) -> None:
    """The owner is here, the writer is far and goes on until it is refused."""
    nbytes = 4 * MIB
    region = pair.near.register(nbytes)
    pair.far.do("register", nbytes=nbytes)
    pair.far.do("connect", address=pair.near.address.hex(), descriptor=region.descriptor.hex())
    pair.far.do("write_for_ever", nbytes=nbytes)
    eventually(lambda: region.buffer[nbytes - 1] != 0)
    region.release()
    region.buffer[:] = bytes(nbytes)
    time.sleep(0.1)
    assert digest(region.buffer) == digest(bytes(nbytes))


def _written_by_far(pair: Pair, nbytes: int) -> tuple[Any, int]:
    """(A region here that the far worker writes again and again, by which link)."""
    given = memoryview(bytearray(nbytes)) if pair.kind == "ucx-given" else None
    region, address = pair.near.register(nbytes, given), pair.near.address
    if pair.kind == "sockets-tcp":
        over_tcp = SocketsAddress.FromString(address)
        over_tcp.unix_path = ""
        address = over_tcp.SerializeToString()
    pair.far.do("register", nbytes=nbytes)
    pair.far.do("connect", address=address.hex(), descriptor=region.descriptor.hex())
    pair.far.do("write_for_ever", nbytes=nbytes)
    eventually(lambda: region.buffer[nbytes - 1] != 0)
    return region, pair.far.do("link_id")


def _is_cut(pair: Pair, link_id: int) -> bool:
    try:
        pair.near.cut(link_id)
    except TransferFailed:
        return False
    return True


def _nothing_lands(region: Any) -> None:
    region.buffer[:] = bytes(region.buffer.nbytes)
    time.sleep(0.1)
    assert not any(bytes(region.buffer))


def test_a_link_that_is_cut_is_quiet_and_its_writer_may_come_again(pair: Pair) -> None:
    region, link_id = _written_by_far(pair, 4 * MIB)
    eventually(lambda: _is_cut(pair, link_id))
    _nothing_lands(region)
    pair.near.cut(link_id)
    assert not pair.near.has_link(link_id)
    pair.near.cut(link_id ^ 1)  # nobody's
    eventually(lambda: not pair.far.do("connected"))
    pair.far.do("connect", address=pair.near.address.hex(), descriptor=region.descriptor.hex())
    pair.far.do("post_noise", nbytes=region.buffer.nbytes, seed=7)
    assert digest(region.buffer) == digest(random.Random(7).randbytes(region.buffer.nbytes))


def test_a_link_is_known_from_its_first_word_to_its_last(pair: Pair) -> None:
    region, link_id = _written_by_far(pair, 4096)
    assert pair.near.has_link(link_id)
    assert not pair.near.has_link(link_id ^ 1)
    pair.far.do("release_peer")
    eventually(lambda: not pair.near.has_link(link_id))
    pair.far.do("connect", address=pair.near.address.hex(), descriptor=region.descriptor.hex())
    again = pair.far.do("link_id")
    assert pair.near.has_link(again)
    region.release()
    assert not pair.near.has_link(again)


def _is_let_in(writer: Transport, owner: Transport, region: Any) -> bool:
    try:
        writer.connect(owner.address, region.descriptor)
    except TransferFailed as error:
        if LINK_IN_USE in error.message:
            return False
        raise
    return True


def test_the_id_of_a_link_is_nobody_elses_until_it_has_ended(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the owner would cut one of the two, and call the memory quiet that the other still writes."""
    region, link_id = _written_by_far(pair, 4 * MIB)
    second = far_worker.open_transport(pair.kind)
    monkeypatch.setattr(secrets, "randbits", lambda bits: link_id)
    assert not _is_let_in(second, pair.near, region)
    assert second.counts()["peers"] == 0
    region.buffer[:] = bytes(region.buffer.nbytes)
    eventually(lambda: region.buffer[-1] != 0)
    assert pair.near.has_link(link_id), "the first is as it was"
    eventually(lambda: _is_cut(pair, link_id))
    _nothing_lands(region)
    eventually(lambda: _is_let_in(second, pair.near, region))
    assert pair.near.has_link(link_id)
    second.close()
    eventually(lambda: not pair.near.has_link(link_id))


@pytest.mark.parametrize("pair", ["ucx"], indirect=True)
def test_a_link_that_is_cut_and_not_let_go_of_keeps_its_id(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """That its writer has mapped the memory is known by that link alone."""
    region, link_id = _written_by_far(pair, 4 * MIB)
    pair.far.process.send_signal(signal.SIGSTOP)
    try:
        assert not _is_cut(pair, link_id)
        second = far_worker.open_transport(pair.kind)
        monkeypatch.setattr(secrets, "randbits", lambda bits: link_id)
        assert not _is_let_in(second, pair.near, region)
        second.close()
        assert not _is_cut(pair, link_id)
    finally:
        pair.far.kill()
    eventually(lambda: _is_cut(pair, link_id))
    _nothing_lands(region)


@only_processes
def test_a_writer_that_is_stopped_is_cut_or_said_to_be_able_to_write(pair: Pair) -> None:
    """One that copies by itself cannot be stopped from outside: only its end, or its word, is a proof."""
    region, link_id = _written_by_far(pair, 4 * MIB)
    pair.far.process.send_signal(signal.SIGSTOP)
    is_mapped = pair.kind == "ucx"
    try:
        for _ in range(2):
            assert _is_cut(pair, link_id) is not is_mapped
    finally:
        if not is_mapped:
            pair.far.process.send_signal(signal.SIGCONT)
    if is_mapped:
        pair.far.kill()
        eventually(lambda: _is_cut(pair, link_id))
    _nothing_lands(region)


def test_counts_return_to_zero_and_close_is_idempotent(pair: Pair) -> None:
    source, peer = pair.connected(4096)
    assert pair.near.counts() == {"regions": 1, "peers": 1, "transfers": 0, "written_bytes": 0}
    peer.post(source, [Piece(0, 0, 4096)]).result(20)
    peer.release()
    source.release()
    assert pair.near.counts() == {"regions": 0, "peers": 0, "transfers": 0, "written_bytes": 4096}
    pair.near.close()
    pair.near.close()
    for verb in (lambda: pair.near.register(8), lambda: pair.near.connect(pair.address(), b"")):
        with pytest.raises(TransferFailed):
            verb()
    pair.far.do("close")
    pair.far.do("close")


def test_memory_outlives_its_transport(pair: Pair) -> None:
    region = pair.near.register(4096)
    view = region.buffer[10:20]
    del region
    pair.near.close()
    view[:] = b"0123456789"
    assert bytes(view) == b"0123456789"


def test_both_ways_at_once(pair: Pair) -> None:
    nbytes = MIB
    source, peer = pair.connected(nbytes)
    mine = pair.near.register(nbytes)
    pair.far.do("register", nbytes=nbytes)
    pair.far.do("connect", address=pair.near.address.hex(), descriptor=mine.descriptor.hex())
    going = [peer.post(source, [Piece(0, 0, nbytes)]) for _ in range(8)]
    pair.far.do("post_noise", nbytes=nbytes, seed=11)
    for transfer in going:
        transfer.result(20)
    assert digest(mine.buffer) == digest(random.Random(11).randbytes(nbytes))
    assert pair.far.do("digest", region=0) == digest(source.buffer)


def test_a_connection_to_oneself(pair: Pair) -> None:
    source, target = pair.near.register(5000), pair.near.register(5000)
    source.buffer[:] = random.Random(1).randbytes(5000)
    peer = pair.near.connect(pair.near.address, target.descriptor)
    peer.post(source, [Piece(0, 0, 5000)]).result(20)
    assert bytes(target.buffer) == bytes(source.buffer)
    target.release()
    peer.release()


def test_a_busy_core_does_not_stall_progress(pair: Pair) -> None:
    """Both sides compute in Python (core and interpreter lock) while blocks move; it must end, and be right."""
    nbytes = 2 * MIB
    source, peer = pair.connected(nbytes)
    near = SameProcess("memory")
    pair.far.do("burn", on=True)
    near.do("burn", on=True)
    try:
        transfers = [peer.post(source, [Piece(at, at, 65536)]) for at in range(0, nbytes, 65536)]
        assert not concurrent.futures.wait(transfers, timeout=60).not_done
    finally:
        near.do("burn", on=False)
        near.do("close")
        pair.far.do("burn", on=False)
    assert pair.far.do("digest") == digest(source.buffer)


@only_processes
def test_an_owner_killed_while_it_is_written_to(pair: Pair) -> None:
    nbytes = 16 * MIB
    source, peer = pair.connected(nbytes)
    peer.post(source, [Piece(0, 0, nbytes)]).result(20)
    transfers = [peer.post(source, [Piece(0, 0, nbytes)]) for _ in range(100)]
    pair.far.kill()
    assert not concurrent.futures.wait(transfers, timeout=20).not_done
    eventually(lambda: not peer.connected)
    with pytest.raises(TransferFailed):
        peer.post(source, [Piece(0, 0, nbytes)]).result(20)
    peer.release()
    assert pair.near.counts()["transfers"] == 0
    replacement = OtherProcess(pair.kind)  # the survivor serves on
    try:
        descriptor = bytes.fromhex(replacement.do("register", nbytes=nbytes))
        again = pair.near.connect(bytes.fromhex(replacement.do("address")), descriptor)
        again.post(source, [Piece(0, 0, nbytes)]).result(20)
        assert replacement.do("digest") == digest(source.buffer)
        again.release()
    finally:
        replacement.end()


@only_processes
def test_a_writer_killed_while_it_writes(pair: Pair) -> None:
    nbytes = 4 * MIB
    region = pair.near.register(nbytes)
    pair.far.do("register", nbytes=nbytes)
    pair.far.do("connect", address=pair.near.address.hex(), descriptor=region.descriptor.hex())
    pair.far.do("fill", value=0xA5)
    pair.far.do("write_for_ever", nbytes=nbytes)
    eventually(lambda: region.buffer[nbytes - 1] == 0xA5)
    pair.far.kill()
    region.release()  # neither hangs nor lets a late byte through
    region.buffer[:] = bytes(nbytes)
    time.sleep(0.1)
    assert digest(region.buffer) == digest(bytes(nbytes))


@contextlib.contextmanager
def _stopped(pair: Pair) -> Iterator[None]:
    """The far process is stuck, every thread of it, until it goes on at the end."""
    pair.far.process.send_signal(signal.SIGSTOP)
    stopped = [psutil.Process(pair.far.process.pid), *map(psutil.Process, _threads_of(pair.far.process.pid))]
    eventually(lambda: all(each.status() == psutil.STATUS_STOPPED for each in stopped))
    try:
        yield
    finally:
        pair.far.process.send_signal(signal.SIGCONT)


def _impatient(monkeypatch: pytest.MonkeyPatch, timeout_s: float) -> None:
    for module in (kvtransfer.sockets_peer, kvtransfer.ucx_peer):
        monkeypatch.setattr(module, "QUIET_TIMEOUT_S", timeout_s)


def _unquiet(pair: Pair, source: Any, peer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The far owner is stuck: what it has received would land when it goes on. release() says so, and does not hang."""
    transfers = [peer.post(source, [Piece(0, 0, source.buffer.nbytes)]) for _ in range(4)]
    eventually(lambda: getattr(peer, "_in_flight", True))  # what never left would be quiet
    _impatient(monkeypatch, 0.15)
    for _ in range(2):
        with pytest.raises(TransferFailed, match="confirm"):
            peer.release()
        assert pair.near.counts()["peers"] == 1
    assert not peer.connected
    assert all(isinstance(transfer.exception(timeout=5), TransferFailed) for transfer in transfers)
    _impatient(monkeypatch, 20.0)


through_the_kernel = pytest.mark.parametrize("pair", ["sockets", "sockets-tcp", "ucx-tcp"], indirect=True)


@through_the_kernel
def test_an_owner_that_was_stuck_is_quiet_once_it_has_confirmed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, peer = pair.connected(8 * MIB)
    with _stopped(pair):
        _unquiet(pair, source, peer, monkeypatch)
    peer.release()
    before = pair.far.do("digest")
    assert pair.near.counts()["peers"] == 0
    time.sleep(0.1)
    assert pair.far.do("digest") == before
    peer.release()
    again = pair.near.connect(pair.address(), pair.far_region(8 * MIB))  # the owner serves on
    again.post(source, [Piece(0, 0, 8 * MIB)]).result(20)
    assert pair.far.do("digest") == digest(source.buffer)


@through_the_kernel
def test_an_owner_that_was_stuck_is_quiet_once_it_is_dead(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    source, peer = pair.connected(8 * MIB)
    with _stopped(pair):
        _unquiet(pair, source, peer, monkeypatch)
        pair.far.kill()
    peer.release()
    assert pair.near.counts()["peers"] == 0


@pytest.mark.parametrize("pair", ["sockets", "ucx-tcp"], indirect=True)
def test_an_owner_that_confirms_after_release_gave_up_is_no_longer_counted(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, peer = pair.connected(8 * MIB)
    with _stopped(pair):
        _unquiet(pair, source, peer, monkeypatch)
    eventually(lambda: pair.near.counts()["peers"] == 0)


@pytest.mark.parametrize("pair", ["sockets", "ucx-tcp"], indirect=True)
def test_closing_does_not_wait_for_ever_for_the_stuck_nor_call_them_quiet(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, peer = pair.connected(8 * MIB)
    with _stopped(pair):
        _unquiet(pair, source, peer, monkeypatch)
        _impatient(monkeypatch, 0.15)
        pair.near.close()
        with pytest.raises(TransferFailed, match="confirm"):
            peer.release()
        pair.far.kill()


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system does not give up on a TCP link early")
@pytest.mark.parametrize("pair", ["sockets-tcp"], indirect=True)
def test_a_link_that_the_system_gave_up_is_not_called_quiet(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that a stuck owner does not drain breaks by TCP_USER_TIMEOUT, with bytes at the owner that still land."""
    source, peer = pair.connected(64 * MIB)
    peer._link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 200)
    with _stopped(pair):
        transfer = peer.post(source, [Piece(0, 0, 64 * MIB)])
        assert isinstance(transfer.exception(timeout=20), TransferFailed)
        _impatient(monkeypatch, 0.15)
        for _ in range(2):
            with pytest.raises(TransferFailed, match="confirm"):
                peer.release()
        _impatient(monkeypatch, 20.0)
    peer.release()
    before = pair.far.do("digest")
    time.sleep(0.1)
    assert pair.far.do("digest") == before
    assert pair.near.counts()["peers"] == 0


@only_processes
def test_connecting_to_the_dead_fails_by_name(pair: Pair) -> None:
    address, descriptor = pair.address(), pair.far_region(64)
    pair.far.kill()
    with pytest.raises(TransferFailed, match="peer"):
        pair.near.connect(address, descriptor, timeout_s=2.0)
    assert pair.near.counts()["peers"] == 0


@only_processes
def test_closing_does_not_wait_for_the_dead(pair: Pair) -> None:
    source, peer = pair.connected(MIB)
    pair.far.kill()
    with contextlib.suppress(TransferFailed):
        peer.post(source, [Piece(0, 0, MIB)])
    pair.near.close()


def test_idle_costs_nothing(pair: Pair) -> None:
    """A connected transport with nothing in flight sleeps: its process takes next to no processor time."""
    source, peer = pair.connected(4096)
    peer.post(source, [Piece(0, 0, 4096)]).result(20)
    time.sleep(0.05)
    before_s = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before_s < 0.1, "it spins while it waits"
    peer.release()
