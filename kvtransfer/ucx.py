"""Writes by libucp: shared memory within a host, RDMA between hosts that have it, TCP otherwise.

Who wants to write says so first (Attach, with the region's token) and gets the region's address and remote key. Where
that key leads to memory that both processes share (ucp_rkey_ptr: libucp allocated the region and the peer is on this
host), a piece is one memcpy. Otherwise pieces are the payload of active messages, which the owner's worker puts where
they belong and confirms; no other thread of the owner takes part.
A link is cut by taking no message of it any more, on the one thread that takes them. A key cannot be taken back, so
the writer of a region that is released, or of a link that is cut, is asked to stop (Revoke), and memory that may be
mapped there is quiet once its lock is let go of (kvtransfer/mapping_lock.py).
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import hmac
import logging
import secrets
import threading
import time
import weakref
from collections.abc import Mapping

from kvtransfer import ucx_key
from kvtransfer.copying import scatter
from kvtransfer.ledger import Ledger
from kvtransfer.mapping_lock import WatchedLock
from kvtransfer.pieces import check_memory
from kvtransfer.transport import LINK_IN_USE, QUIET_TIMEOUT_S, Peer, Region, Transfer, Transport
from kvtransfer.ucx_address import TOKEN_BYTES, opened, sealed, short, token_of
from kvtransfer.ucx_context import default_options
from kvtransfer.ucx_peer import UcxPeer
from kvtransfer.ucx_worker import Endpoint, UcxWorker
from kvtransfer.writes import landing_of
from legato.v1.transfer_pb2 import RegionDescriptor, TransferFrame
from spec.errors import TransferFailed

LOOK_S = 0.01  # whether a lock is let go of
_log = logging.getLogger(__name__)


class UcxTransport(Transport, Ledger):
    """`host` is an address of the network to use; `options` are libucp's own, named without UCX_, over the defaults."""

    name = "ucx"

    def __init__(self, host: str = "127.0.0.1", options: Mapping[str, str] | None = None) -> None:
        self._lock = threading.Lock()  # guards the collections that counts() reads
        self._regions: dict[bytes, _UcxRegion] = {}  # by token
        self._peers: dict[int, UcxPeer] = {}  # by link
        self._transfers: set[Transfer] = set()
        self._links: dict[int, _Link] = {}  # let in; only the worker's thread changes it
        self._written_bytes = 0
        self._closed = False
        self._worker = UcxWorker(
            default_options(host) | dict(options or {}),
            on_frame=self._receive,
            on_data=self._receive_data,
            on_lost=self._lost,
            on_turn=self._turn,
        )
        self._endpoint_address = sealed(self._worker.address, self._worker.library.version)
        self.address = self._endpoint_address.SerializeToString()
        self.detail = f"libucp {self._worker.library.version}: {' '.join(self._worker.resources())}"

    def register(self, nbytes: int, memory: memoryview | None = None) -> Region:
        check_memory(nbytes, memory)
        self._refuse_when_closed()
        region = _UcxRegion(self, nbytes, memory)
        with self._lock:
            self._regions[region.token] = region
        return region

    def connect(self, address: bytes, descriptor: bytes, timeout_s: float = 5.0) -> Peer:
        self._refuse_when_closed()
        theirs = opened(address, self._worker.library.version)
        token = token_of(descriptor)
        peer = UcxPeer(self, self._worker)
        with self._lock:
            self._peers[peer.link_id] = peer
        try:
            self._worker.submit(lambda: peer.attach(theirs.worker_address, self._endpoint_address, token))
            peer.attached.result(timeout_s)
        except concurrent.futures.TimeoutError:
            peer.abandon()
            raise TransferFailed(f"the peer at {short(theirs)} does not answer", address=short(theirs)) from None
        except TransferFailed as error:
            peer.abandon()
            raise TransferFailed(f"the peer at {short(theirs)}: {error.message}", address=short(theirs)) from None
        return peer

    def has_link(self, link_id: int) -> bool:
        with self._lock:
            link = self._links.get(link_id)
        return link is not None and not link.is_cut and not link.gone.done() and not link.region.released

    def cut(self, link_id: int) -> None:
        link: _Link | None = self._worker.call(lambda: self._cut(link_id))
        if link is not None and link.mapping.is_held:
            raise TransferFailed("the writer may have this memory mapped, and its process lives")

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
        elif kind == "detach" and (link := self._links.get(frame.detach.link_id)):
            self._gone([link])
        elif kind == "attached" and (peer := self._peer_of(frame.attached.link_id)):
            peer.was_attached(frame.attached)
        elif kind == "written" and (peer := self._peer_of(frame.written.link_id)):
            peer.was_written(frame.written)
        elif kind == "revoke" and (peer := self._peer_of(frame.revoke.link_id)):
            peer.lose("the owner has released the region")

    def _peer_of(self, link_id: int) -> UcxPeer | None:
        with self._lock:
            return self._peers.get(link_id)

    def _receive_data(self, write: TransferFrame.Write, data: int, nbytes: int) -> None:
        """Puts the payload of a Write where it belongs and says so; of one that is not let in, says that."""
        link = self._links.get(write.link_id)
        if link is None or link.gone.done():
            return  # its writer has said goodbye, or never was let in
        refused = ""
        try:
            part = landing_of(write, link.region.nbytes)
            if link.region.released or link.is_cut:
                refused = "the owner has released the region" if link.region.released else "the owner has cut the link"
            elif part.nbytes != nbytes:
                refused = "a write that is none"
            else:
                scatter(part, data, link.region.base)
        except TransferFailed as error:
            refused = error.message
        self._worker.soon(lambda: self._confirm(link, write, refused))

    def _confirm(self, link: _Link, write: TransferFrame.Write, refused: str) -> None:
        written = TransferFrame.Written(write_id=write.write_id, link_id=write.link_id, refused=refused)
        self._worker.send(link.endpoint, TransferFrame(written=written))

    def _welcome(self, attach: TransferFrame.Attach) -> None:
        try:
            theirs = opened(attach.reply_to.SerializeToString(), self._worker.library.version)
            endpoint = self._worker.endpoint(theirs.worker_address)
        except TransferFailed:
            return  # there is no way back to it
        answer = TransferFrame.Attached(link_id=attach.link_id)
        with self._lock:
            found = (r for token, r in self._regions.items() if hmac.compare_digest(token, attach.token))
            region = next(found, None)
        self._forget_ended()
        if region is None or region.released:
            answer.refused = "no region of this descriptor"
        elif attach.link_id in self._links:  # its mapping is the only evidence that this memory may be written
            answer.refused = LINK_IN_USE
            _log.warning("a writer is refused: %s (%016x)", LINK_IN_USE, attach.link_id)
        else:
            mapping = WatchedLock(attach.mapping_lock)
            with self._lock:
                self._links[attach.link_id] = _Link(region, endpoint, mapping)
            answer.region_bytes, answer.base_address = region.nbytes, region.base
            if mapping.is_held:  # so that it can be seen when it has let go
                answer.remote_key = region.remote_key
            ucx_key.seal(answer)
        self._worker.send(endpoint, TransferFrame(attached=answer))

    def _lost(self, endpoint: Endpoint) -> None:
        self._gone([link for link in self._links.values() if link.endpoint is endpoint])
        with self._lock:
            peers = [peer for peer in self._peers.values() if peer.endpoint is endpoint]
        for peer in peers:
            peer.was_lost(endpoint.lost, dead=endpoint.dead)

    def _gone(self, links: list[_Link]) -> None:
        for link in links:
            if not link.gone.done():
                link.gone.set_result(None)
        self._forget_ended()

    def _forget_ended(self) -> None:
        """Those by which nothing comes any more, and whose writers have let go."""
        ended = [link_id for link_id, link in self._links.items() if link.gone.done() and not link.mapping.is_held]
        with self._lock:
            for link_id in ended:
                del self._links[link_id]

    def _cut(self, link_id: int) -> _Link | None:
        self._forget_ended()
        link = self._links.get(link_id)
        if link is not None and not link.is_cut:
            link.is_cut = True
            self._worker.send(link.endpoint, TransferFrame(revoke=TransferFrame.Revoke(link_id=link_id)))
        return link

    def _revoke(self, region: _UcxRegion) -> list[_Link]:
        region.released = True
        with self._lock:
            self._regions.pop(region.token, None)
        links = {link_id: link for link_id, link in self._links.items() if link.region is region}
        for link_id, link in links.items():
            self._worker.send(link.endpoint, TransferFrame(revoke=TransferFrame.Revoke(link_id=link_id)))
        return list(links.values())

    # ---- the ledger, from any thread

    def began(self, transfer: Transfer) -> None:
        with self._lock:
            self._transfers.add(transfer)

    def ended(self, transfer: Transfer, written_bytes: int) -> None:
        with self._lock:
            self._transfers.discard(transfer)
            self._written_bytes += written_bytes

    def forget(self, link_id: int) -> None:
        with self._lock:
            self._peers.pop(link_id, None)


@dataclasses.dataclass(slots=True)
class _Link:
    """The owner's end: one writer that was let in."""

    region: _UcxRegion
    endpoint: Endpoint
    mapping: WatchedLock
    is_cut: bool = False  # no message of it is taken any more
    gone: concurrent.futures.Future[None] = dataclasses.field(default_factory=concurrent.futures.Future)  # by messages

    def ends_by(self, deadline_s: float) -> bool:
        """Waits until nothing can come by it any more."""
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.gone.result(max(0.0, deadline_s - time.monotonic()))
        while self.mapping.is_held and time.monotonic() < deadline_s:
            time.sleep(LOOK_S)
        return self.gone.done() and not self.mapping.is_held


_kept_forever: list[object] = []  # memory that a stuck writer may still write into


class _UcxRegion(Region):
    def __init__(self, transport: UcxTransport, nbytes: int, memory: memoryview | None) -> None:
        self._transport = transport
        self._worker = worker = transport._worker
        self.nbytes = nbytes
        self.released = False
        self.token = secrets.token_bytes(TOKEN_BYTES)
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
            if not link.ends_by(deadline_s):
                _kept_forever.append((self.buffer, self._given))
                raise TransferFailed("a writer does not confirm that it writes no more")
        if self._given is not None:
            self._worker.unmap(self._mapping)
            self._given = None
