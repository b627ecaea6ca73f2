"""The writer's end of a link of sockets, for kvtransfer/sockets.py: what sends, what reads acknowledgements, and how it
learns that the owner writes no more."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import socket
import threading
import time
from collections.abc import Sequence

from kvtransfer import vectors
from kvtransfer.frames import BYTES_FOLLOW, dial, receive_frame, send_frame, spelled
from kvtransfer.grids import Grid, TransferPlan
from kvtransfer.ledger import Ledger
from kvtransfer.pieces import check_pieces, planned
from kvtransfer.transport import QUIET_TIMEOUT_S, Peer, Piece, Region, Transfer
from kvtransfer.writes import address_of, announced, parts
from legato.v1.transfer_pb2 import SocketsAddress, TransferFrame
from spec.errors import TransferFailed

ASK_AGAIN_S = 0.2


@dataclasses.dataclass(slots=True)
class _Outgoing:
    transfer: Transfer
    source: memoryview
    plan: TransferPlan


class SocketsPeer(Peer):
    def __init__(
        self, ledger: Ledger, link: socket.socket, where: SocketsAddress, link_id: int, region_bytes: int
    ) -> None:
        self.link_id = link_id
        self._ledger = ledger
        self._link = link
        self.runs_over = "unix socket" if link.family == socket.AF_UNIX else "tcp"
        self._where = where
        self._named = spelled(where.tcp_host, where.tcp_port)
        self._region_bytes = region_bytes
        self._released = False
        self._confirmed = False  # the owner is known to write nothing more of this link
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
        check_pieces(pieces, source.buffer.nbytes, self._region_bytes)
        transfer = Transfer()
        transfer.set_running_or_notify_cancel()
        outgoing = _Outgoing(transfer, source.buffer, planned(pieces))
        with self._changed:
            if self._lost:
                raise TransferFailed(self._lost, address=self._named)
            transfer_id = next(self._ids)
            self._outgoing[transfer_id] = outgoing
            self._queue.append(transfer_id)
            self._ledger.began(transfer)
            self._changed.notify_all()
        return transfer

    def release(self) -> None:
        self._released = True
        self._lose("the peer is released")
        deadline_s = time.monotonic() + QUIET_TIMEOUT_S
        self._reader.join(QUIET_TIMEOUT_S)  # it ends when the owner has closed its side, or the link broke
        if not self._reader.is_alive() and not self._confirmed:
            self._confirmed = self._has_ended(deadline_s)
        if not self._confirmed:
            raise TransferFailed(f"{self._named} does not confirm that it writes no more", address=self._named)
        self._end()

    def cut(self) -> None:
        """Ends the threads and closes the link, whatever the owner does."""
        self._lose("the transport is closed")
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)
        self._reader.join()
        self._end()

    def _has_ended(self, deadline_s: float) -> bool:
        """Asks by new connections until there is an answer. True when the owner has ended the old link, or is dead."""
        detach = TransferFrame(detach=TransferFrame.Detach(link_id=self.link_id))
        while (left_s := deadline_s - time.monotonic()) > 0:
            try:
                with dial(self._where, left_s) as link:
                    send_frame(link, detach)
                    if receive_frame(link) == detach:
                        return True
            except ConnectionRefusedError:
                return True  # where it listened as long as it lived, none does
            except (OSError, TransferFailed):
                pass  # it cannot be reached, or is stuck
            time.sleep(max(0.0, min(ASK_AGAIN_S, deadline_s - time.monotonic())))
        return False

    def _end(self) -> None:
        self._sender.join()
        self._link.close()
        self._ledger.forget(self.link_id)

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
            self._ledger.ended(outgoing.transfer, 0)
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
            writes = parts(outgoing.plan)
            try:
                for number, part in enumerate(writes, 1):
                    write = announced(part, transfer_id, more=number < len(writes))
                    self._send_write(write, outgoing.source, part)
            except OSError as error:
                self._lose(f"the link to {self._named} broke: {error}")

    def _send_write(self, write: TransferFrame.Write, source: memoryview, part: Grid) -> None:
        address, _held = address_of(source)
        send_frame(self._link, TransferFrame(write=write), BYTES_FOLLOW)
        vectors.send(self._link, part, address)

    def _read(self) -> None:
        why = f"{self._named} ended the link"
        try:
            while frame := receive_frame(self._link):
                if frame.HasField("written"):
                    self._acknowledged(frame.written.write_id)
                elif frame.HasField("detach"):
                    self._confirmed = True
        except (OSError, TransferFailed) as error:
            why = f"the link to {self._named} broke: {error}"
        self._lose(why)
        if self._released and self._confirmed:
            self._end()  # release() may have given up

    def _acknowledged(self, transfer_id: int) -> None:
        with self._changed:
            outgoing = self._outgoing.pop(transfer_id, None)
        if outgoing is None:
            return  # it failed in the meantime
        self._ledger.ended(outgoing.transfer, outgoing.plan.nbytes)
        outgoing.transfer.set_result(None)
