"""The reference transport: several workers in one process. It is the specification that the conformance suite reads.

Nothing here is fast or clever: one thread per transport copies pieces in the order in which they fall due. A FaultPlan
says which of a transport's posts go wrong, so that every fault of a hand-over can be played without a network.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import hmac
import secrets
import threading
import time
from collections.abc import Mapping, Sequence

from kvtransfer.pieces import check_memory, check_pieces, pages
from kvtransfer.transport import LINK_IN_USE, Peer, Piece, Region, Transfer, Transport
from spec.errors import TransferFailed


class FaultKind(enum.Enum):
    FAIL = "fail"  # the first half lands, the transfer fails
    TRUNCATE = "truncate"  # the first half lands, the transfer says that it is done
    CORRUPT = "corrupt"  # one bit is flipped on the way, the transfer says that it is done
    DELAY = "delay"  # it moves `delay_s` later
    LOSE_PEER = "lose_peer"  # the peer is lost before a byte lands


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    kind: FaultKind
    delay_s: float = 0.0


FaultPlan = Mapping[int, Fault]  # by how many posts this transport saw before


class MemoryTransport(Transport):
    name = "memory"
    detail = "within this process"

    def __init__(self, faults: FaultPlan | None = None) -> None:
        self.address = secrets.token_bytes(16)
        self._faults = dict(faults or {})
        self._changed = threading.Condition()  # guards all that follows
        self._regions: dict[bytes, _MemoryRegion] = {}
        self._peers: set[_MemoryPeer] = set()
        self._links: dict[int, _MemoryPeer] = {}  # of others, into regions of ours
        self._due: list[tuple[float, int, _Write]] = []
        self._moving: _Write | None = None
        self._transfers: set[Transfer] = set()
        self._posts = 0
        self._written_bytes = 0
        self._closed = False
        _transports[self.address] = self
        self._mover = threading.Thread(target=self._move_what_is_due, name="memory-transport", daemon=True)
        self._mover.start()

    def inject(self, fault: Fault) -> None:
        """Into the next post."""
        with self._changed:
            self._faults[self._posts] = fault

    def register(self, nbytes: int, memory: memoryview | None = None) -> Region:
        check_memory(nbytes, memory)
        region = _MemoryRegion(self, pages(nbytes) if memory is None else memory.cast("B"))
        with self._changed:
            self._refuse_when_closed()
            self._regions[region.descriptor] = region
        return region

    def connect(self, address: bytes, descriptor: bytes, timeout_s: float = 5.0) -> Peer:
        owner = _transports.get(address)
        if owner is None:
            raise TransferFailed(f"no transport answers at memory address {address.hex()}", address=address.hex())
        with owner._changed:
            target = next((r for d, r in owner._regions.items() if hmac.compare_digest(d, descriptor)), None)
            if target is None:
                raise TransferFailed("the peer knows no region of this descriptor", address=address.hex())
            peer = _MemoryPeer(self, target)
            if peer.link_id in owner._links:
                raise TransferFailed(LINK_IN_USE, address=address.hex())
            owner._links[peer.link_id] = peer
        with self._changed:
            is_closed = self._closed
            self._peers.add(peer)
        if is_closed:
            peer.release()
            self._refuse_when_closed()
        return peer

    def has_link(self, link_id: int) -> bool:
        with self._changed:
            peer = self._links.get(link_id)
        return peer is not None and peer.connected and not peer.target.released

    def cut(self, link_id: int) -> None:
        with self._changed:
            peer = self._links.get(link_id)
        if peer is not None:
            peer.lose("the owner has cut the link")
            self.forget(peer)

    def forget(self, peer: _MemoryPeer) -> None:
        """Nothing of it lands any more: its link's id is free."""
        with self._changed:
            if self._links.get(peer.link_id) is peer:
                del self._links[peer.link_id]

    def close(self) -> None:
        _transports.pop(self.address, None)
        with self._changed:
            self._closed = True
            peers, regions = list(self._peers), list(self._regions.values())
            self._changed.notify_all()
        for peer in peers:
            peer.release()
        for region in regions:
            region.release()
        self._mover.join()

    def counts(self) -> dict[str, int]:
        with self._changed:
            return {
                "regions": len(self._regions),
                "peers": len(self._peers),
                "transfers": len(self._transfers),
                "written_bytes": self._written_bytes,
            }

    def _refuse_when_closed(self) -> None:
        if self._closed:
            raise TransferFailed("this transport is closed")

    def _submit(self, peer: _MemoryPeer, source: Region, pieces: Sequence[Piece]) -> Transfer:
        transfer = Transfer()
        transfer.set_running_or_notify_cancel()
        with self._changed:
            self._refuse_when_closed()
            fault = self._faults.get(self._posts)
            delay_s = fault.delay_s if fault else 0.0
            write = _Write(peer, source.buffer, list(pieces), transfer, fault.kind if fault else None)
            heapq.heappush(self._due, (time.monotonic() + delay_s, self._posts, write))
            self._posts += 1
            self._transfers.add(transfer)
            self._changed.notify_all()
        return transfer

    def _move_what_is_due(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or (self._due and self._due[0][0] <= time.monotonic())):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if not self._due:
                    return
                self._moving = write = heapq.heappop(self._due)[2]
            failure: TransferFailed | None = None
            try:
                write.peer._land(write)
            except TransferFailed as error:
                failure = error
            with self._changed:
                self._transfers.discard(write.transfer)
                self._written_bytes += 0 if failure else sum(piece.nbytes for piece in write.pieces)
            write.transfer.set_exception(failure) if failure else write.transfer.set_result(None)
            with self._changed:
                self._moving = None
                self._changed.notify_all()


_transports: dict[bytes, MemoryTransport] = {}


class _MemoryRegion(Region):
    def __init__(self, transport: MemoryTransport, buffer: memoryview) -> None:
        self.buffer = buffer
        self.descriptor = secrets.token_bytes(16)
        self.transport = transport
        self.writing = threading.Lock()  # held while a piece lands, so that release() is the end of writing
        self.released = False

    def release(self) -> None:
        with self.writing:
            self.released = True
        with self.transport._changed:
            self.transport._regions.pop(self.descriptor, None)


@dataclasses.dataclass(slots=True)
class _Write:
    peer: _MemoryPeer
    source: memoryview
    pieces: list[Piece]
    transfer: Transfer
    fault: FaultKind | None


class _MemoryPeer(Peer):
    runs_over = "shared memory"

    def __init__(self, transport: MemoryTransport, target: _MemoryRegion) -> None:
        self.connected = True
        self.link_id = secrets.randbits(64)
        self._transport = transport
        self.target = target
        self._lost = ""

    def post(self, source: Region, pieces: Sequence[Piece]) -> Transfer:
        check_pieces(pieces, source.buffer.nbytes, self.target.buffer.nbytes)
        if not self.connected:
            raise TransferFailed(self._lost)
        return self._transport._submit(self, source, pieces)

    def release(self) -> None:
        self.lose("the peer is released")
        with self._transport._changed:
            self._transport._peers.discard(self)
        self.target.transport.forget(self)

    def lose(self, why: str) -> None:
        """Returns when nothing of it lands any more."""
        with self.target.writing:
            self.connected, self._lost = False, self._lost or why
        with self._transport._changed:
            unmoved = [entry[2] for entry in self._transport._due if entry[2].peer is self]
            self._transport._due = [entry for entry in self._transport._due if entry[2].peer is not self]
            heapq.heapify(self._transport._due)
            self._transport._transfers.difference_update(write.transfer for write in unmoved)
        for write in unmoved:
            write.transfer.set_exception(TransferFailed(self._lost))
        with self._transport._changed:
            self._transport._changed.wait_for(
                lambda: self._transport._moving is None or self._transport._moving.peer is not self
            )

    def _land(self, write: _Write) -> None:
        """Copies, on the mover's thread. Raises TransferFailed."""
        with self.target.writing:
            if write.fault is FaultKind.LOSE_PEER:
                self.connected, self._lost = False, "the peer is lost"
            if self.target.released:
                self.connected, self._lost = False, self._lost or "the owner has released the region"
            if not self.connected:
                raise TransferFailed(self._lost)
            budget_bytes = sum(piece.nbytes for piece in write.pieces)
            if write.fault in (FaultKind.FAIL, FaultKind.TRUNCATE):
                budget_bytes //= 2
            for source_offset, target_offset, nbytes in write.pieces:
                nbytes = min(nbytes, budget_bytes)
                budget_bytes -= nbytes
                landing = self.target.buffer[target_offset : target_offset + nbytes]
                landing[:] = write.source[source_offset : source_offset + nbytes]
            if write.fault is FaultKind.CORRUPT:
                landing[nbytes // 2] ^= 0x10
            if write.fault is FaultKind.FAIL:
                raise TransferFailed("the link broke")
