"""Six verbs move memory: register, exchange, connect, post, check, release. has_link and cut are for silent writers.

    owner of the memory                       writer
    region = transport.register(nbytes)
    transport.address, region.descriptor ───▶ peer = transport.connect(address, descriptor)      (over gRPC or Redis)
                                              transfer = peer.post(source_region, pieces)
                                              transfer.result(timeout_s) / transfer.done()
    region.release()                          peer.release()
    transport.has_link(link_id)               peer.link_id
    transport.cut(link_id)

One-sided: the owner takes no part in a write. A transfer that is done has landed: the owner sees its bytes. A transfer
that failed may have landed in part; `peer.release()` returns only when nothing of that peer is in flight any more,
which is what "quiet" means in the hand-over. `transport.cut()` comes to that without the writer: it is the owner's own
act, and needs nobody's word. It is a proof for a link that was let in: one link has one id, and who may write says by
which before it does, so that has_link() can be asked.
"""

from __future__ import annotations

import abc
import concurrent.futures
from collections.abc import Sequence
from typing import NamedTuple

QUIET_TIMEOUT_S = 10.0  # how long release() waits for a process that is alive and does not answer
LINK_IN_USE = "a link of this id has not ended"  # by an owner that lets nobody in by it


class Piece(NamedTuple):
    """`nbytes` from `source_offset` in the local region to `target_offset` in the peer's."""

    source_offset: int
    target_offset: int
    nbytes: int


class Region(abc.ABC):
    """Memory that peers may write into through this transport, until released."""

    buffer: memoryview  # writable, format "B"; torch.frombuffer takes it
    descriptor: bytes  # what a peer needs to write here; unguessable

    @abc.abstractmethod
    def release(self) -> None:
        """Returns when no byte of a peer can land any more; peers' later writes fail. Idempotent. Raises TransferFailed
        when a peer neither confirms nor dies within QUIET_TIMEOUT_S; such memory must not be used again.

        The memory itself lives as long as a view of `buffer` does."""


class Transfer(concurrent.futures.Future[None]):
    """Done when every byte has landed; fails with TransferFailed. `done()` is the check, `result(timeout)` the wait.

    Done-callbacks run on the transport's own thread: they hand over to another and never call a verb that waits."""


class Peer(abc.ABC):
    """A connection for writing into one region of one process."""

    link_id: int  # drawn at random by the writer; the owner knows the link by it
    connected: bool  # False once released, or once the peer is known to be lost; never True again
    digests_rows = False  # while it copies them, of plans that say which rows they carry
    runs_over: str  # "shared memory", "unix socket", "tcp", or the names of libucp's transports, such as "rc_mlx5"

    @abc.abstractmethod
    def post(self, source: Region, pieces: Sequence[Piece]) -> Transfer:
        """Starts to write; returns at once. Transfers of one peer may finish in any order. `source` may be released
        before the transfer is done; its bytes must not change until then.

        Raises InvalidParameter when a piece lies outside `source` or outside the peer's region, and TransferFailed when
        the peer is released or lost.
        """

    @abc.abstractmethod
    def release(self) -> None:
        """Fails what is in flight, takes no more, and returns when no byte of it can land any more: the owner has
        confirmed that, or has died. Idempotent.

        Raises TransferFailed when the owner has done neither within QUIET_TIMEOUT_S (it is stuck, or cannot be
        reached), or when the transport was closed before it did. Then nothing is proven: bytes may have landed and may
        still land. The peer goes on to be counted, and release() may be called again at any time: it waits and asks
        anew, and returns or raises by what is true then."""


class Transport(abc.ABC):
    """One instance per process and kind. Thread-safe. Making one raises TransportUnavailable: what is missing here."""

    name: str
    address: bytes  # what a peer's connect() takes
    detail: str  # for people: what it runs over

    @abc.abstractmethod
    def register(self, nbytes: int, memory: memoryview | None = None) -> Region:
        """Allocates `nbytes` of zeros that peers may write into, or takes `memory` (writable, of that size) if given.

        A worker allocates its KV memory through the first transport and registers the same memory with the others."""

    @abc.abstractmethod
    def connect(self, address: bytes, descriptor: bytes, timeout_s: float = 5.0) -> Peer:
        """Reaches the peer (a real exchange of bytes, so that a wrong address fails here and not at the first write).

        Raises TransferFailed naming the address when it does not answer in time, or refuses: it has no such region, or
        a link of this id that has not ended."""

    @abc.abstractmethod
    def has_link(self, link_id: int) -> bool:
        """The owner's: whether that peer was let in, and its link has neither ended nor was cut. Does not wait."""

    @abc.abstractmethod
    def cut(self, link_id: int) -> None:
        """The owner's: ends that peer's link from this side, all that is in flight on it with it. Returns when no byte
        of it can land any more; of a link that has ended none can. The writer finds its peer lost. Of a link that never
        was let in it proves nothing, and returns: has_link() is asked before the first write.

        Raises TransferFailed where that does not prove it: the writer has mapped this memory, and its process lives and
        has not let go of it yet. It may be called again: returns once that is so."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases all peers and regions, cuts off those that do not confirm, and ends the threads. Idempotent."""

    @abc.abstractmethod
    def counts(self) -> dict[str, int]:
        """{"regions", "peers", "transfers"} alive now, for promise P3; "written_bytes" ever."""
