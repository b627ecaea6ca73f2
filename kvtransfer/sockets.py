"""Plain sockets: a Unix socket to a process of the same host, TCP otherwise. Portable; needs nothing installed.

The wire is protos/legato/v1/transfer.proto, framed as in kvtransfer/frames.py; a Write is followed by the bytes that it
describes, piece after piece, from region to region: many to a system call (kvtransfer/vectors.py).

Threads: one accepts; one per link on the owner's side writes what arrives; two per peer on the writer's side
(kvtransfer/sockets_peer.py) send and read acknowledgements. A link ends by half-closing: the writer shuts its direction
down, and the owner drains what is under way, says Detach and closes. That word is the proof that no byte can land any
more; a mere end of the link is none, since the system gives up links as well. Without it the writer asks by a new
connection (Detach, with the old link's id).
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
import sys
import tempfile
import threading
import time

from google.protobuf.message import DecodeError

from kvtransfer import vectors
from kvtransfer.frames import (
    dial,
    host_id,
    listen,
    receive_frame,
    send_frame,
    spelled,
    tune,
    unix_name,
)
from kvtransfer.ledger import Ledger
from kvtransfer.pieces import check_memory, pages
from kvtransfer.sockets_peer import SocketsPeer
from kvtransfer.transport import LINK_IN_USE, Peer, Region, Transfer, Transport
from kvtransfer.writes import address_of, landing_of
from legato.v1.transfer_pb2 import RegionDescriptor, SocketsAddress, TransferFrame
from spec.errors import TransferFailed, TransportUnavailable

ATTACH_TIMEOUT_S = 5.0
_log = logging.getLogger(__name__)


class SocketsTransport(Transport, Ledger):
    """Listens on `host`, a name or an address of IPv4 or IPv6 (and announces it to peers), at a port that the system
    picks."""

    name = "sockets"

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()  # guards the four collections and the counter
        self._regions: dict[bytes, _SocketsRegion] = {}
        self._links: set[_Link] = set()
        self._peers: dict[int, SocketsPeer] = {}  # by link
        self._transfers: set[Transfer] = set()
        self._written_bytes = 0
        self._closed = False
        try:
            tcp = listen(host)
        except (OSError, ValueError) as error:
            raise TransportUnavailable(f"cannot listen on {host}: {error}", host=host) from None
        unix, unix_path = self._listen_unix()
        self._listeners = [tcp, unix]
        tcp_port = tcp.getsockname()[1]
        address = SocketsAddress(host_id=host_id(), unix_path=unix_path, tcp_host=host, tcp_port=tcp_port)
        self.address = address.SerializeToString()
        self.detail = f"Unix socket within this host, TCP at {spelled(host, tcp_port)}"
        self._wake, self._woken = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name="sockets-accept", daemon=True)
        self._acceptor.start()

    def register(self, nbytes: int, memory: memoryview | None = None) -> Region:
        check_memory(nbytes, memory)
        region = _SocketsRegion(self, pages(nbytes) if memory is None else memory.cast("B"))
        with self._lock:
            self._refuse_when_closed()
            self._regions[region.token] = region
        return region

    def connect(self, address: bytes, descriptor: bytes, timeout_s: float = 5.0) -> Peer:
        try:
            where = SocketsAddress.FromString(address)
            token = RegionDescriptor.FromString(descriptor).token
        except DecodeError:
            raise TransferFailed("not an address and descriptor of sockets", address=address.hex()) from None
        named = spelled(where.tcp_host, where.tcp_port)
        try:
            link = dial(where, timeout_s)
        except (OSError, ValueError, OverflowError) as error:  # no such name, or none at all; no such port
            raise TransferFailed(f"no peer answers at {named}: {error}", address=named) from None
        link_id = secrets.randbits(64)
        try:
            send_frame(link, TransferFrame(attach=TransferFrame.Attach(link_id=link_id, token=token)))
            answer = receive_frame(link)
        except (OSError, TransferFailed) as error:
            link.close()
            raise TransferFailed(f"the peer at {named} did not answer: {error}", address=named) from None
        if answer is None or not answer.HasField("attached") or answer.attached.refused:
            link.close()
            why = answer.attached.refused if answer else "it closed the connection"
            raise TransferFailed(f"the peer at {named} refused: {why}", address=named)
        link.settimeout(None)
        peer = SocketsPeer(self, link, where, link_id, answer.attached.region_bytes)
        with self._lock:
            closed = self._closed
            self._peers[link_id] = peer
        if closed:
            peer.release()
            self._refuse_when_closed()
        return peer

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            peers, regions = list(self._peers.values()), list(self._regions.values())
        self._wake.send(b"\0")
        self._acceptor.join()
        for peer in peers:
            with contextlib.suppress(TransferFailed):  # an owner that is stuck
                peer.release()
            peer.cut()
        for region in regions:
            region.release()
        with self._lock:
            links = list(self._links)
        for link in links:
            link.end()
        for held in (*self._listeners, self._wake, self._woken):
            held.close()
        if self._folder is not None:
            self._folder.cleanup()

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

    def _listen_unix(self) -> tuple[socket.socket, str]:
        """Linux's abstract namespace leaves no file behind, even after kill -9; elsewhere a file in our own folder."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if sys.platform == "linux":
            path = f"@legato-{secrets.token_hex(12)}"
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="legato-")
            path = f"{self._folder.name}/kv"
        listener.bind(unix_name(path))
        listener.listen(128)
        return listener, path

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in (*self._listeners, self._woken):
                selector.register(listener, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):  # it left before we looked
                        link = _Link(self, key.fileobj.accept()[0])
                        with self._lock:
                            self._links.add(link)
                        link.start()

    def admit(self, link: _Link, attach: TransferFrame.Attach) -> str:
        """Gives the link its region and id. Why not; "": it is let in."""
        with self._lock:  # so that a region that is being released either sees this link or is not found by it
            known = (region for its, region in self._regions.items() if hmac.compare_digest(its, attach.token))
            region = next(known, None)
            if region is None:
                return "no region of this descriptor"
            if self._link_of(attach.link_id) is not None:
                _log.warning("a writer is refused: %s (%016x)", LINK_IN_USE, attach.link_id)
                return LINK_IN_USE
            link.region, link.link_id = region, attach.link_id
            return ""

    def has_link(self, link_id: int) -> bool:
        with self._lock:
            link = self._link_of(link_id)
            return link is not None and not link.is_ending

    def cut(self, link_id: int) -> None:
        """The thread that writes what arrives has ended; what the system had taken in goes with the connection."""
        with self._lock:
            link = self._link_of(link_id)
        if link is not None:
            link.end()

    def _link_of(self, link_id: int) -> _Link | None:
        """With the lock held."""
        return next((link for link in self._links if link.link_id == link_id), None)

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


class _SocketsRegion(Region):
    def __init__(self, transport: SocketsTransport, buffer: memoryview) -> None:
        self.buffer = buffer
        self.token = secrets.token_bytes(16)
        self.descriptor = RegionDescriptor(token=self.token).SerializeToString()
        self._transport = transport

    def release(self) -> None:
        with self._transport._lock:
            self._transport._regions.pop(self.token, None)
            links = [link for link in self._transport._links if link.region is self]
        for link in links:
            link.end()


class _Link(threading.Thread):
    """The owner's end: one writer's connection, and the thread that writes what arrives on it."""

    def __init__(self, transport: SocketsTransport, connection: socket.socket) -> None:
        super().__init__(name="sockets-link", daemon=True)
        self.region: _SocketsRegion | None = None  # None until the writer has shown the token
        self.link_id: int | None = None  # likewise
        self.is_ending = False
        self._transport = transport
        self._connection = connection

    def end(self) -> None:
        """Returns when this link writes no more."""
        self.is_ending = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self.join()

    def run(self) -> None:
        try:
            with contextlib.suppress(OSError, TransferFailed):  # the writer sees the end of the link
                self._welcome()
                if self.region is not None:
                    self._write_what_arrives(self.region.buffer)
        finally:
            with self._transport._lock:
                self._transport._links.discard(self)
            self._connection.close()

    def _welcome(self) -> None:
        tune(self._connection)
        frame = receive_frame(self._connection, time.monotonic() + ATTACH_TIMEOUT_S)
        if frame is not None and frame.HasField("detach"):
            self._transport.cut(frame.detach.link_id)
            send_frame(self._connection, frame)
        if frame is None or not frame.HasField("attach"):
            return
        self._connection.settimeout(ATTACH_TIMEOUT_S)
        answer = TransferFrame.Attached(refused=self._transport.admit(self, frame.attach))
        if self.region is not None:
            answer.region_bytes = self.region.buffer.nbytes
        send_frame(self._connection, TransferFrame(attached=answer))
        self._connection.settimeout(None)

    def _write_what_arrives(self, buffer: memoryview) -> None:
        base, _held = address_of(buffer)
        while not self.is_ending and (frame := receive_frame(self._connection)):
            if not frame.HasField("write"):
                return
            if not self._write(buffer, base, frame.write):
                break
            if not frame.write.more:
                written = TransferFrame.Written(write_id=frame.write.write_id)
                send_frame(self._connection, TransferFrame(written=written))
        send_frame(self._connection, TransferFrame(detach=TransferFrame.Detach(link_id=self.link_id)))

    def _write(self, buffer: memoryview, base: int, write: TransferFrame.Write) -> bool:
        """False when this link ends before all of it has landed. Raises TransferFailed when the writer does."""
        part = landing_of(write, buffer.nbytes)
        left_bytes = part.nbytes
        for got_bytes in vectors.receive(self._connection, part, base):
            if not got_bytes:
                raise TransferFailed("the link ended within a write")
            left_bytes -= got_bytes
            if self.is_ending:
                break
        return not left_bytes
