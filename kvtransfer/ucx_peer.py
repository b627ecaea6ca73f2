"""The writer's end of a UCX link, for kvtransfer/ucx.py.

A transfer is cut into parts. Where the peer's region is mapped here, a part is copied; otherwise it is sent as one
active message and is in flight until the owner says Written, so that "nothing in flight" means that nothing can land.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import secrets
import sys
from collections.abc import Sequence

from kvtransfer import libucp, ucx_key, vectors
from kvtransfer.copying import copy
from kvtransfer.grids import Grid
from kvtransfer.ledger import Ledger
from kvtransfer.mapping_lock import MappingLock
from kvtransfer.pieces import check_pieces, planned
from kvtransfer.transport import QUIET_TIMEOUT_S, Peer, Piece, Region, Transfer
from kvtransfer.ucx_worker import Endpoint, UcxWorker
from kvtransfer.writes import address_of, announced, parts
from legato.v1.transfer_pb2 import TransferFrame, UcxAddress
from spec.errors import TransferFailed

TURN_BYTES = 4 << 20  # copied before the thread looks at what else there is
WRITES_IN_FLIGHT = 8
MESSAGE_BYTES = 4 << 20  # of one piece: the owner's libucp puts a message together before it gives it away


@dataclasses.dataclass(slots=True)
class _Outgoing:
    transfer: Transfer
    held: object  # keeps the source's memory
    source_address: int
    total_bytes: int
    parts: collections.deque[Grid]  # not taken yet
    writes: int = 0  # in flight
    failed: bool = False


class UcxPeer(Peer):
    """Everything but post(), release() and abandon() runs on the worker's thread."""

    def __init__(self, ledger: Ledger, worker: UcxWorker) -> None:
        self._ledger = ledger
        self._worker = worker
        self.link_id = secrets.randbits(64)
        self.endpoint: Endpoint | None = None
        self.attached: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._why = ""  # it takes no more writes
        self._region_bytes = 0
        self._mapped_base = 0  # where the peer's region lies in this process, 0 when it does not
        self._remote_key = 0  # keeps it mapped
        self._mapping_lock = MappingLock()
        self._queue: collections.deque[_Outgoing] = collections.deque()  # with parts that are not taken
        self._write_ids = itertools.count(1)
        self._in_flight: dict[int, _Outgoing] = {}  # by write id: sent and not yet Written
        self._unproven = ""  # nobody will ever say what became of what was in flight
        self._quiet: concurrent.futures.Future[None] = concurrent.futures.Future()  # nothing in flight or to come

    @property
    def connected(self) -> bool:  # type: ignore[override]
        return not self._why and self.attached.done()

    @property
    def digests_rows(self) -> bool:  # type: ignore[override]
        return bool(self._mapped_base)

    def post(self, source: Region, pieces: Sequence[Piece]) -> Transfer:
        total_bytes = check_pieces(pieces, source.buffer.nbytes, self._region_bytes)
        if self._why:
            raise TransferFailed(self._why)
        source_address, held = address_of(source.buffer)
        plan = planned(pieces)
        if self._mapped_base:
            left = [part for grid in plan.grids for part in grid.cut(TURN_BYTES, TURN_BYTES, sys.maxsize)]
        else:
            left = parts(plan, self._worker.max_header_bytes, MESSAGE_BYTES)
        write = _Outgoing(Transfer(), held, source_address, total_bytes, collections.deque(left))
        write.transfer.set_running_or_notify_cancel()
        self._ledger.began(write.transfer)
        try:
            self._worker.submit(lambda: self._enqueue(write))
        except TransferFailed as error:
            self._fail(write, error.message)
        return write.transfer

    def release(self) -> None:
        with contextlib.suppress(TransferFailed):  # the transport is closed: what there was to learn is known
            self._worker.submit(lambda: self.lose("the peer is released"))
        try:
            self._quiet.result(QUIET_TIMEOUT_S)
        except concurrent.futures.TimeoutError:
            raise TransferFailed("the owner does not confirm that nothing is in flight") from None

    def abandon(self) -> None:
        """The handshake failed."""
        self._ledger.forget(self.link_id)
        with contextlib.suppress(TransferFailed):
            self._worker.submit(lambda: self.lose("it never was connected"))

    def attach(self, worker_address: bytes, reply_to: UcxAddress, token: bytes) -> None:
        try:
            self.endpoint = self._worker.endpoint(worker_address)
        except TransferFailed as error:
            self.attached.set_exception(error)
            return
        lock = self._mapping_lock.name
        attach = TransferFrame.Attach(link_id=self.link_id, token=token, reply_to=reply_to, mapping_lock=lock)
        self._worker.send(self.endpoint, TransferFrame(attach=attach))

    def was_attached(self, answer: TransferFrame.Attached) -> None:
        if self._why or self.attached.done():
            return
        if answer.refused:
            self.endpoint = None  # it has no link to say goodbye by; of this id another may have one
            self.attached.set_exception(TransferFailed(answer.refused))
            return
        assert self.endpoint is not None
        try:
            ucx_key.check(answer)
        except TransferFailed as error:
            self.attached.set_exception(error)
            return
        self._remote_key, self._mapped_base = ucx_key.map_region(self._worker.library, self.endpoint.handle, answer)
        self.runs_over = "shared memory" if self._mapped_base else self._worker.lanes(self.endpoint)
        if self._mapped_base:
            self._mapping_lock.forget_name()
        else:
            self._mapping_lock.let_go()
        self._region_bytes = answer.region_bytes
        self.attached.set_result(None)

    def was_written(self, answer: TransferFrame.Written) -> None:
        write = self._in_flight.pop(answer.write_id, None)
        if write is None:
            return
        write.writes -= 1
        if answer.refused:
            self._fail(write, answer.refused)
        self._landed(write)
        self._settle()

    def was_lost(self, why: str, *, dead: bool) -> None:
        """The endpoint is closed. Of an owner that is dead nothing in flight lands any more; of another it may."""
        in_flight = list(self._in_flight.values())
        self._in_flight.clear()
        for write in in_flight:
            self._fail(write, why)
        if in_flight and not dead:
            self._unproven = f"{why}, and the owner did not confirm that nothing is in flight"
        self.lose(why)

    def lose(self, why: str) -> None:
        """Fails what is under way and takes no more. The first reason stays."""
        self._why = self._why or why
        if not self.attached.done():
            self.attached.set_exception(TransferFailed(self._why))
        writes = [*self._queue, *self._in_flight.values()]
        self._queue.clear()
        for write in writes:
            self._fail(write, self._why)
        self._settle()

    def advance(self) -> bool:
        """The next parts. True when more could go at once."""
        copied_bytes = 0
        while self._queue and copied_bytes < TURN_BYTES and len(self._in_flight) < WRITES_IN_FLIGHT:
            write = self._queue[0]
            if write.failed:
                self._queue.popleft()
                continue
            part = write.parts.popleft()
            if not write.parts:
                self._queue.popleft()
            if not self._mapped_base:
                self._send(write, part)
                continue
            copy(part, write.source_address, self._mapped_base)
            copied_bytes += part.nbytes
            self._landed(write)
        return bool(self._queue and copied_bytes)

    def _enqueue(self, write: _Outgoing) -> None:
        if self._why:
            self._fail(write, self._why)
        else:
            self._queue.append(write)

    def _send(self, write: _Outgoing, part: Grid) -> None:
        assert self.endpoint is not None
        write_id = next(self._write_ids)
        write.writes += 1
        self._in_flight[write_id] = write

        def sent(status: int) -> None:
            if status != libucp.OK:
                self._not_sent(write, write_id, status)

        header = announced(part, write_id, link_id=self.link_id)
        self._worker.send_data(self.endpoint, header, vectors.sources(part, write.source_address), sent)

    def _not_sent(self, write: _Outgoing, write_id: int, status: int) -> None:
        if write_id in self._in_flight:
            del self._in_flight[write_id]
            write.writes -= 1
            self._fail(write, f"the write failed: {self._worker.library.text_of(status)}")
            self._settle()

    def _landed(self, write: _Outgoing) -> None:
        if not write.parts and not write.writes and not write.failed:
            self._ledger.ended(write.transfer, write.total_bytes)
            write.transfer.set_result(None)

    def _fail(self, write: _Outgoing, why: str) -> None:
        if not write.failed and not write.transfer.done():
            write.failed = True
            self._ledger.ended(write.transfer, 0)
            write.transfer.set_exception(TransferFailed(why))

    def _settle(self) -> None:
        """When it takes no more and nothing is in flight: tells the owner, and lets go of its memory."""
        if not self._why or self._in_flight or self._quiet.done():
            return
        self._mapped_base = 0
        if self._remote_key:
            self._worker.library.ucp_rkey_destroy(self._remote_key)
        self._mapping_lock.let_go()
        if self.endpoint is not None:
            self._worker.send(self.endpoint, TransferFrame(detach=TransferFrame.Detach(link_id=self.link_id)))
        self._ledger.forget(self.link_id)
        if self._unproven:
            self._quiet.set_exception(TransferFailed(self._unproven))
        else:
            self._quiet.set_result(None)
