"""One-sided writes by libucp: RDMA between hosts that have it, TCP otherwise, CMA or shared memory within one host.

Who wants to write says so first (Attach, with the region's token) and gets the region's address and remote key. Where
that key leads to memory that both processes share (ucp_rkey_ptr: libucp allocated the region and the peer is on this
host), a piece is one memcpy; otherwise it is one ucp_put_nbx, and a transfer is done when the flush behind its puts is:
the bytes have landed. libucp cannot take a remote key back, so a region that is released asks its writers to stop
(Revoke) and waits for each one's Detach, or its death.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import hashlib
import hmac
import ipaddress
import secrets
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path

from google.protobuf.message import DecodeError

from kvtransfer import libucp
from kvtransfer.pieces import check_memory, check_pieces
from kvtransfer.transport import QUIET_TIMEOUT_S, Peer, Piece, Region, Transfer, Transport
from kvtransfer.ucx_worker import Endpoint, UcxWorker
from legato.v1.transfer_pb2 import RegionDescriptor, TransferFrame, UcxAddress
from spec.errors import TransferFailed

SLICE_BYTES = 4 << 20  # copied in one turn, or put before one flush; between two the thread looks at what else there is
SLICE_PIECES = 256
SLICES_IN_FLIGHT = 4
BRIEF_BYTES = 64 << 10  # a copy up to this keeps the interpreter lock
_copy_briefly, _copy = ctypes.PyDLL(None).memmove, ctypes.CDLL(None).memmove
for _function in (_copy_briefly, _copy):
    _function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    _function.restype = ctypes.c_void_p

_Gone = concurrent.futures.Future[None]


def default_options(host: str) -> dict[str, str]:
    """What libucp is told: loopback stays on loopback; without GPU and RDMA device the transports of a plain host."""
    options = {"TCP_TX_SEG_SIZE": "128k", "TCP_RX_SEG_SIZE": "128k"}
    if host == "localhost" or ipaddress.ip_address(host).is_loopback:
        options["NET_DEVICES"] = "lo"
    if not Path("/proc/driver/nvidia").exists() and not Path("/sys/class/infiniband").exists():
        options["TLS"] = "tcp,sm,self"
    return options


class UcxTransport(Transport):
    """`host` is an address of the network to use; `options` are libucp's own, named without UCX_, over the defaults."""

    name = "ucx"

    def __init__(self, host: str = "127.0.0.1", options: Mapping[str, str] | None = None) -> None:
        self._lock = threading.Lock()  # guards the collections that counts() reads
        self._regions: dict[bytes, _UcxRegion] = {}  # by token
        self._peers: dict[int, _UcxPeer] = {}  # by link
        self._transfers: set[Transfer] = set()
        self._links: dict[int, _Link] = {}  # the worker's thread alone
        self._written_bytes = 0
        self._closed = False
        self._worker = UcxWorker(
            default_options(host) | dict(options or {}),
            on_frame=self._receive,
            on_lost=self._lost,
            on_turn=self._turn,
        )
        self._endpoint_address = _sealed(self._worker.address, self._worker.library.version)
        self.address = self._endpoint_address.SerializeToString()

    def register(self, nbytes: int, memory: memoryview | None = None) -> Region:
        check_memory(nbytes, memory)
        self._refuse_when_closed()
        region = _UcxRegion(self, nbytes, memory)
        with self._lock:
            self._regions[region.token] = region
        return region

    def connect(self, address: bytes, descriptor: bytes, timeout_s: float = 5.0) -> Peer:
        self._refuse_when_closed()
        theirs = self._opened(address)
        try:
            token = RegionDescriptor.FromString(descriptor).token
        except DecodeError:
            raise TransferFailed("not a descriptor of ucx", descriptor=descriptor.hex()) from None
        peer = _UcxPeer(self, self._worker)
        with self._lock:
            self._peers[peer.link_id] = peer
        try:
            self._worker.submit(lambda: peer.attach(theirs.worker_address, self._endpoint_address, token))
            peer.attached.result(timeout_s)
        except concurrent.futures.TimeoutError:
            peer.abandon()
            raise TransferFailed(f"the peer at {_short(theirs)} does not answer", address=_short(theirs)) from None
        except TransferFailed as error:
            peer.abandon()
            raise TransferFailed(f"the peer at {_short(theirs)}: {error.message}", address=_short(theirs)) from None
        return peer

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            peers, regions = list(self._peers.values()), list(self._regions.values())
        for release in [held.release for held in peers] + [held.release for held in regions]:
            with contextlib.suppress(TransferFailed):  # a peer that is stuck; the worker's end cuts it off
                release()
        self._worker.stop()

    def counts(self) -> dict[str, int]:
        with self._lock:
            return {
                "regions": len(self._regions),
                "peers": len(self._peers),
                "transfers": len(self._transfers),
                "written_bytes": self._written_bytes,
            }

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise TransferFailed("this transport is closed")

    def _opened(self, address: bytes) -> UcxAddress:
        """Raises TransferFailed for what is no address: libucp would parse any bytes."""
        try:
            theirs = UcxAddress.FromString(address)
        except DecodeError:
            raise TransferFailed("not an address of ucx", address=address.hex()[:32]) from None
        if not hmac.compare_digest(_sealed(theirs.worker_address, "").checksum, theirs.checksum):
            raise TransferFailed("not an address of ucx, or a damaged one", address=address.hex()[:32])
        ours = self._worker.library.version
        if theirs.version.split(".")[:2] != ours.split(".")[:2]:
            raise TransferFailed(f"the peer's libucp is {theirs.version}, this one's is {ours}")
        return theirs

    # ---- on the worker's thread

    def _turn(self) -> bool:
        with self._lock:
            peers = list(self._peers.values())
        more = [peer.advance() for peer in peers]  # each of them, whatever the first says
        return any(more)

    def _receive(self, frame: TransferFrame) -> None:
        kind = frame.WhichOneof("frame")
        if kind == "attach":
            self._welcome(frame.attach)
        elif kind == "detach" and (link := self._links.pop(frame.detach.link_id, None)):
            link.gone.set_result(None)
        elif kind in ("attached", "revoke"):
            body = frame.attached if kind == "attached" else frame.revoke
            peer = self._peers.get(body.link_id)
            if peer is not None:
                peer.was_attached(frame.attached) if kind == "attached" else peer.was_revoked()

    def _welcome(self, attach: TransferFrame.Attach) -> None:
        try:
            theirs = self._opened(attach.reply_to.SerializeToString())
            endpoint = self._worker.endpoint(theirs.worker_address)
        except TransferFailed:
            return  # there is no way back to it
        answer = TransferFrame.Attached(link_id=attach.link_id)
        with self._lock:
            found = (r for token, r in self._regions.items() if hmac.compare_digest(token, attach.token))
            region = next(found, None)
        if region is None or region.released:
            answer.refused = "no region of this descriptor"
        else:
            self._links[attach.link_id] = _Link(region, endpoint)
            answer.region_bytes, answer.base_address, answer.remote_key = region.nbytes, region.base, region.remote_key
        self._worker.send(endpoint, TransferFrame(attached=answer))

    def _lost(self, endpoint: Endpoint) -> None:
        for link_id in [link_id for link_id, link in self._links.items() if link.endpoint is endpoint]:
            self._links.pop(link_id).gone.set_result(None)
        with self._lock:
            peers = [peer for peer in self._peers.values() if peer.endpoint is endpoint]
        for peer in peers:
            peer.lose(endpoint.lost)

    def _revoke(self, region: _UcxRegion) -> list[_Link]:
        region.released = True
        with self._lock:
            self._regions.pop(region.token, None)
        links = {link_id: link for link_id, link in self._links.items() if link.region is region}
        for link_id, link in links.items():
            self._worker.send(link.endpoint, TransferFrame(revoke=TransferFrame.Revoke(link_id=link_id)))
        return list(links.values())

    def _began(self, transfer: Transfer) -> None:
        with self._lock:
            self._transfers.add(transfer)

    def _ended(self, write: _Write, why: str) -> None:
        with self._lock:
            self._transfers.discard(write.transfer)
            self._written_bytes += 0 if why else write.total_bytes
        write.transfer.set_exception(TransferFailed(why)) if why else write.transfer.set_result(None)


@dataclasses.dataclass(slots=True)
class _Link:
    """The owner's end: one writer that was let in."""

    region: _UcxRegion
    endpoint: Endpoint
    gone: _Gone = dataclasses.field(default_factory=concurrent.futures.Future)


_kept_forever: list[object] = []  # memory that a stuck writer may still write into


class _UcxRegion(Region):
    def __init__(self, transport: UcxTransport, nbytes: int, memory: memoryview | None) -> None:
        self._transport = transport
        self._worker = worker = transport._worker
        self.nbytes = nbytes
        self.released = False
        self.token = secrets.token_bytes(16)
        self.descriptor = RegionDescriptor(token=self.token).SerializeToString()
        self._given = None if memory is None else ctypes.c_ubyte.from_buffer(memory.cast("B"))
        given_address = None if self._given is None else ctypes.addressof(self._given)
        self._mapping, self.base, self.remote_key = worker.call(lambda: worker.map(nbytes, given_address))
        if memory is None:
            array = (ctypes.c_ubyte * nbytes).from_address(self.base)
            weakref.finalize(array, worker.unmap, self._mapping).atexit = False
            self.buffer = memoryview(array).cast("B")
        else:
            self.buffer = memory.cast("B")

    def release(self) -> None:
        if self.released:
            return
        links: list[_Link] = self._worker.call(lambda: self._transport._revoke(self))
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        for link in links:
            try:
                link.gone.result(max(0.0, deadline_s - time.monotonic()))
            except concurrent.futures.TimeoutError:
                _kept_forever.append((self.buffer, self._given))
                self._worker.submit(lambda link=link: self._worker.lose(link.endpoint, "it does not stop"))  # type: ignore[misc]
                raise TransferFailed("a writer does not confirm that it writes no more") from None
        if self._given is not None:
            self._worker.unmap(self._mapping)
            self._given = None


@dataclasses.dataclass(slots=True)
class _Write:
    transfer: Transfer
    held: ctypes.c_ubyte  # keeps the source's memory
    source_address: int
    pieces: Sequence[Piece]
    total_bytes: int
    next_piece: int = 0
    next_byte: int = 0  # within that piece
    slices: int = 0  # put and not yet flushed
    failed: str = ""

    def take(self) -> list[tuple[int, int, int]]:
        """The next slice: (source address, target offset, nbytes)."""
        taken: list[tuple[int, int, int]] = []
        budget_bytes = SLICE_BYTES
        while budget_bytes and self.next_piece < len(self.pieces) and len(taken) < SLICE_PIECES:
            source_offset, target_offset, nbytes = self.pieces[self.next_piece]
            size = min(nbytes - self.next_byte, budget_bytes)
            source = self.source_address + source_offset + self.next_byte
            taken.append((source, target_offset + self.next_byte, size))
            budget_bytes -= size
            self.next_byte += size
            if self.next_byte == nbytes:
                self.next_piece, self.next_byte = self.next_piece + 1, 0
        return taken

    @property
    def all_taken(self) -> bool:
        return self.next_piece == len(self.pieces)


class _UcxPeer(Peer):
    """Everything but post() and release() runs on the worker's thread."""

    def __init__(self, transport: UcxTransport, worker: UcxWorker) -> None:
        self._transport = transport
        self._worker = worker
        self.link_id = secrets.randbits(64)
        self.endpoint: Endpoint | None = None
        self.attached: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._why = ""  # it takes no more writes
        self._region_bytes = self._remote_base = 0
        self._mapped_base = 0  # where the peer's region lies in this process, 0 when it cannot
        self._remote_key: int | None = None
        self._queue: collections.deque[_Write] = collections.deque()  # not wholly taken
        self._slices = 0  # of all writes, put and not yet flushed
        self._quiet: _Gone = concurrent.futures.Future()  # nothing in flight, nothing to come

    @property
    def connected(self) -> bool:  # type: ignore[override]
        return not self._why and self.attached.done()

    def post(self, source: Region, pieces: Sequence[Piece]) -> Transfer:
        total_bytes = check_pieces(pieces, source.buffer.nbytes, self._region_bytes)
        if self._why:
            raise TransferFailed(self._why)
        held = ctypes.c_ubyte.from_buffer(source.buffer)
        write = _Write(Transfer(), held, ctypes.addressof(held), list(pieces), total_bytes)
        write.transfer.set_running_or_notify_cancel()
        self._transport._began(write.transfer)
        try:
            self._worker.submit(lambda: self._enqueue(write))
        except TransferFailed as error:
            self._transport._ended(write, error.message)
        return write.transfer

    def release(self) -> None:
        with contextlib.suppress(TransferFailed):  # the transport is closed: nothing is in flight
            self._worker.submit(lambda: self.lose("the peer is released"))
            try:
                self._quiet.result(QUIET_TIMEOUT_S)
            except concurrent.futures.TimeoutError:
                self._worker.submit(self._cut)
                raise TransferFailed("the owner does not confirm that nothing is in flight") from None
            finally:
                self._forget()

    def abandon(self) -> None:
        """The handshake failed."""
        self._forget()
        with contextlib.suppress(TransferFailed):
            self._worker.submit(lambda: self.lose("it never was connected"))

    def attach(self, worker_address: bytes, reply_to: UcxAddress, token: bytes) -> None:
        try:
            self.endpoint = self._worker.endpoint(worker_address)
        except TransferFailed as error:
            self.attached.set_exception(error)
            return
        attach = TransferFrame.Attach(link_id=self.link_id, token=token, reply_to=reply_to)
        self._worker.send(self.endpoint, TransferFrame(attach=attach))

    def was_attached(self, answer: TransferFrame.Attached) -> None:
        if self._why or self.attached.done():
            return
        if answer.refused:
            self.attached.set_exception(TransferFailed(answer.refused))
            return
        assert self.endpoint is not None
        key, pointer, library = ctypes.c_void_p(), ctypes.c_void_p(), self._worker.library
        status = library.ucp_ep_rkey_unpack(self.endpoint.handle, answer.remote_key, ctypes.byref(key))
        if status != libucp.OK:
            self.attached.set_exception(TransferFailed(f"its remote key: {library.text_of(status)}"))
            return
        self._remote_key, self._remote_base, self._region_bytes = key.value, answer.base_address, answer.region_bytes
        if library.ucp_rkey_ptr(key, answer.base_address, ctypes.byref(pointer)) == libucp.OK:
            self._mapped_base = pointer.value or 0
        self.attached.set_result(None)

    def was_revoked(self) -> None:
        self.lose("the owner has released the region")

    def lose(self, why: str) -> None:
        """Fails what is in flight and takes no more. The first reason stays."""
        self._why = self._why or why
        if not self.attached.done():
            self.attached.set_exception(TransferFailed(self._why))
        writes = list(self._queue)
        self._queue.clear()
        for write in writes:
            self._fail(write, self._why)
        self._settle()

    def advance(self) -> bool:
        """The next slices. True when more could be copied at once."""
        while self._queue and self._slices < SLICES_IN_FLIGHT:
            write = self._queue[0]
            if write.failed:
                self._queue.popleft()
                continue
            taken = write.take()
            if write.all_taken:
                self._queue.popleft()
            if self._mapped_base:
                self._copy(taken)
                self._landed(write)
                return bool(self._queue)
            self._put(write, taken)
        return False

    def _enqueue(self, write: _Write) -> None:
        self._fail(write, self._why) if self._why else self._queue.append(write)

    def _copy(self, taken: list[tuple[int, int, int]]) -> None:
        for source, target_offset, nbytes in taken:
            copy = _copy_briefly if nbytes <= BRIEF_BYTES else _copy
            copy(self._mapped_base + target_offset, source, nbytes)

    def _put(self, write: _Write, taken: list[tuple[int, int, int]]) -> None:
        assert self.endpoint is not None
        slow, brief, plain = self._worker.library, self._worker.library.briefly, ctypes.byref(libucp.PLAIN)
        requests: list[int | None] = []
        for source, target_offset, nbytes in taken:
            put = brief.ucp_put_nbx if nbytes <= BRIEF_BYTES else slow.ucp_put_nbx
            requests.append(
                put(self.endpoint.handle, source, nbytes, self._remote_base + target_offset, self._remote_key, plain)
            )
        requests.append(self._worker.flush(self.endpoint))
        write.slices += 1
        self._slices += 1
        self._worker.wait_for(requests, lambda status: self._flushed(write, status))

    def _flushed(self, write: _Write, status: int) -> None:
        write.slices -= 1
        self._slices -= 1
        if status != libucp.OK:
            self._fail(write, f"the write failed: {self._worker.library.text_of(status)}")
        self._landed(write)
        self._settle()

    def _landed(self, write: _Write) -> None:
        if write.all_taken and not write.slices and not write.failed:
            self._transport._ended(write, "")

    def _fail(self, write: _Write, why: str) -> None:
        if not write.failed:
            write.failed = why
            self._transport._ended(write, why)

    def _settle(self) -> None:
        """When it takes no more and nothing is in flight: tells the owner, and lets go of its memory."""
        if not self._why or self._slices or self._quiet.done():
            return
        self._mapped_base = 0
        if self._remote_key is not None:
            self._worker.library.ucp_rkey_destroy(self._remote_key)
        if self.endpoint is not None:
            self._worker.send(self.endpoint, TransferFrame(detach=TransferFrame.Detach(link_id=self.link_id)))
        self._quiet.set_result(None)

    def _cut(self) -> None:
        if self.endpoint is not None:
            self._worker.lose(self.endpoint, "it does not answer")

    def _forget(self) -> None:
        with self._transport._lock:
            self._transport._peers.pop(self.link_id, None)


def _sealed(worker_address: bytes, version: str) -> UcxAddress:
    checksum = hashlib.blake2b(worker_address, digest_size=16).digest()
    return UcxAddress(worker_address=worker_address, checksum=checksum, version=version)


def _short(address: UcxAddress) -> str:
    return address.checksum.hex()[:12]
