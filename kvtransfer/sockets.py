"""Plain sockets: a Unix socket to a process of the same host, TCP otherwise. Portable; needs nothing installed.

The wire is protos/legato/v1/transfer.proto, framed as in kvtransfer/frames.py; a Write is followed by the bytes that it
describes, piece after piece. Nothing is copied in Python: the sender gathers from its region (sendmsg), the receiver
scatters into its own (recvmsg_into).

Threads: one accepts; one per link on the owner's side writes what arrives; two per peer on the writer's side send and
read acknowledgements. A link ends by half-closing: the writer shuts its direction down, the owner drains what is under
way and closes, and the writer's read of that end is the proof that no byte can land any more.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hmac
import itertools
import secrets
import selectors
import socket
import sys
import tempfile
import threading
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from kvtransfer.frames import advance, batches, dial, host_id, receive_frame, send_frame, tune, unix_name
from kvtransfer.pieces import check_memory, check_pieces, pages
from kvtransfer.transport import QUIET_TIMEOUT_S, Peer, Piece, Region, Transfer, Transport
from legato.v1.transfer_pb2 import RegionDescriptor, SocketsAddress, TransferFrame
from spec.errors import TransferFailed, TransportUnavailable

FRAME_PIECES = 4096  # a transfer of more pieces is sent as several Writes
ATTACH_TIMEOUT_S = 5.0


class SocketsTransport(Transport):
    """Listens on `host` (and announces it to peers), at a port that the system picks."""

    name = "sockets"

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._lock = threading.Lock()  # guards the four collections and the counter
        self._regions: dict[bytes, _SocketsRegion] = {}
        self._links: set[_Link] = set()
        self._peers: set[_SocketsPeer] = set()
        self._transfers: set[Transfer] = set()
        self._written_bytes = 0
        self._closed = False
        try:
            tcp = socket.create_server((host, 0), backlog=128)
        except OSError as error:
            raise TransportUnavailable(f"cannot listen on {host}: {error}", host=host) from None
        unix, unix_path = self._listen_unix()
        self._listeners = [tcp, unix]
        tcp_port = tcp.getsockname()[1]
        address = SocketsAddress(host_id=host_id(), unix_path=unix_path, tcp_host=host, tcp_port=tcp_port)
        self.address = address.SerializeToString()
        self.detail = f"Unix socket within this host, TCP at {host}:{tcp_port}"
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
        named = f"{where.tcp_host}:{where.tcp_port}"
        try:
            link = dial(where, timeout_s)
        except OSError as error:
            raise TransferFailed(f"no peer answers at {named}: {error}", address=named) from None
        try:
            send_frame(link, TransferFrame(attach=TransferFrame.Attach(token=token)))
            answer = receive_frame(link)
        except (OSError, TransferFailed) as error:
            link.close()
            raise TransferFailed(f"the peer at {named} did not answer: {error}", address=named) from None
        if answer is None or not answer.HasField("attached") or answer.attached.refused:
            link.close()
            why = answer.attached.refused if answer else "it closed the connection"
            raise TransferFailed(f"the peer at {named} refused: {why}", address=named)
        link.settimeout(None)
        peer = _SocketsPeer(self, link, named, answer.attached.region_bytes)
        with self._lock:
            closed = self._closed
            self._peers.add(peer)
        if closed:
            peer.release()
            self._refuse_when_closed()
        return peer

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            peers, regions = list(self._peers), list(self._regions.values())
        self._wake.send(b"\0")
        self._acceptor.join()
        for peer in peers:
            peer.release()
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

    def _admit(self, link: _Link, token: bytes) -> None:
        with self._lock:  # so that a region that is being released either sees this link or is not found by it
            known = (region for its, region in self._regions.items() if hmac.compare_digest(its, token))
            link.region = next(known, None)

    def _ended(self, transfer: Transfer, written_bytes: int) -> None:
        with self._lock:
            self._transfers.discard(transfer)
            self._written_bytes += written_bytes


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
        self._transport = transport
        self._connection = connection
        self._ending = False

    def end(self) -> None:
        """Returns when this link writes no more."""
        self._ending = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self.join()

    def run(self) -> None:
        try:
            with contextlib.suppress(OSError, TransferFailed):  # the writer sees the end of the link
                self._welcome()
                while self.region is not None and not self._ending and (frame := receive_frame(self._connection)):
                    if not frame.HasField("write"):
                        return
                    self._write(self.region.buffer, frame.write)
                    written = TransferFrame.Written(write_id=frame.write.write_id)
                    send_frame(self._connection, TransferFrame(written=written))
        finally:
            with self._transport._lock:
                self._transport._links.discard(self)
            self._connection.close()

    def _welcome(self) -> None:
        self._connection.settimeout(ATTACH_TIMEOUT_S)
        tune(self._connection)
        frame = receive_frame(self._connection)
        if frame is None or not frame.HasField("attach"):
            return
        self._transport._admit(self, frame.attach.token)
        if self.region is None:
            answer = TransferFrame.Attached(refused="no region of this descriptor")
        else:
            answer = TransferFrame.Attached(region_bytes=self.region.buffer.nbytes)
        send_frame(self._connection, TransferFrame(attached=answer))
        self._connection.settimeout(None)

    def _write(self, buffer: memoryview, write: TransferFrame.Write) -> None:
        pieces = list(zip(write.target_offsets, write.nbytes, strict=False))
        if len(write.target_offsets) != len(write.nbytes) or any(o + n > buffer.nbytes for o, n in pieces):
            raise TransferFailed("a write outside the region")
        for views in batches(buffer, pieces):
            while views and not self._ending:
                got_bytes = self._connection.recvmsg_into(views)[0]
                if not got_bytes:
                    raise TransferFailed("the link ended within a write")
                advance(views, got_bytes)


@dataclasses.dataclass(slots=True)
class _Outgoing:
    transfer: Transfer
    source: memoryview
    pieces: list[Piece]
    total_bytes: int
    unacknowledged_frames: int


class _SocketsPeer(Peer):
    def __init__(self, transport: SocketsTransport, link: socket.socket, named: str, region_bytes: int) -> None:
        self._transport = transport
        self._link = link
        self._named = named
        self._region_bytes = region_bytes
        self._changed = threading.Condition()  # guards what follows
        self._lost = ""  # why, once it is not connected
        self._ids = itertools.count(1)
        self._queue: collections.deque[int] = collections.deque()
        self._outgoing: dict[int, _Outgoing] = {}
        self._sender = threading.Thread(target=self._send, name="sockets-send", daemon=True)
        self._reader = threading.Thread(target=self._read, name="sockets-read", daemon=True)
        self._sender.start()
        self._reader.start()

    @property
    def connected(self) -> bool:  # type: ignore[override]
        return not self._lost

    def post(self, source: Region, pieces: Sequence[Piece]) -> Transfer:
        total_bytes = check_pieces(pieces, source.buffer.nbytes, self._region_bytes)
        transfer = Transfer()
        transfer.set_running_or_notify_cancel()
        frames = -(-len(pieces) // FRAME_PIECES)
        with self._changed:
            if self._lost:
                raise TransferFailed(self._lost, address=self._named)
            transfer_id = next(self._ids)
            self._outgoing[transfer_id] = _Outgoing(transfer, source.buffer, list(pieces), total_bytes, frames)
            self._queue.append(transfer_id)
            with self._transport._lock:
                self._transport._transfers.add(transfer)
            self._changed.notify_all()
        return transfer

    def release(self) -> None:
        self._lose("the peer is released")
        self._sender.join(QUIET_TIMEOUT_S)
        self._reader.join(QUIET_TIMEOUT_S)  # it ends when the owner has closed its side
        stuck = self._reader.is_alive()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._link.close()
        with self._transport._lock:
            self._transport._peers.discard(self)
        if stuck:
            raise TransferFailed(f"{self._named} does not confirm that it writes no more", address=self._named)

    def _lose(self, why: str) -> None:
        """Fails what is in flight and half-closes the link. The first reason stays."""
        with self._changed:
            self._lost = self._lost or why
            failed = list(self._outgoing.values())
            self._outgoing.clear()
            self._queue.clear()
            self._changed.notify_all()
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_WR)
        for outgoing in failed:
            self._transport._ended(outgoing.transfer, 0)
            outgoing.transfer.set_exception(TransferFailed(self._lost, address=self._named))

    def _send(self) -> None:
        while True:
            with self._changed:
                while not (self._queue or self._lost):
                    self._changed.wait()
                if self._lost:
                    return
                transfer_id = self._queue.popleft()
                outgoing = self._outgoing[transfer_id]
            try:
                for first in range(0, len(outgoing.pieces), FRAME_PIECES):
                    self._send_write(transfer_id, outgoing.source, outgoing.pieces[first : first + FRAME_PIECES])
            except OSError as error:
                self._lose(f"the link to {self._named} broke: {error}")

    def _send_write(self, transfer_id: int, source: memoryview, pieces: list[Piece]) -> None:
        write = TransferFrame.Write(
            write_id=transfer_id,  # the same for all Writes of a transfer: they are counted
            target_offsets=[piece.target_offset for piece in pieces],
            nbytes=[piece.nbytes for piece in pieces],
        )
        send_frame(self._link, TransferFrame(write=write))
        for views in batches(source, [(piece.source_offset, piece.nbytes) for piece in pieces]):
            while views:
                advance(views, self._link.sendmsg(views))

    def _read(self) -> None:
        why = f"{self._named} ended the link"
        try:
            while frame := receive_frame(self._link):
                if frame.HasField("written"):
                    self._acknowledged(frame.written.write_id)
        except (OSError, TransferFailed) as error:
            why = f"the link to {self._named} broke: {error}"
        self._lose(why)

    def _acknowledged(self, transfer_id: int) -> None:
        with self._changed:
            outgoing = self._outgoing.get(transfer_id)
            if outgoing is None:
                return  # it failed in the meantime
            outgoing.unacknowledged_frames -= 1
            if outgoing.unacknowledged_frames:
                return
            del self._outgoing[transfer_id]
        self._transport._ended(outgoing.transfer, outgoing.total_bytes)
        outgoing.transfer.set_result(None)
