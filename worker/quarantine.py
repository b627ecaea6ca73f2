"""Memory of hand-overs whose stream broke, or whose writer does not stop: out of use until nothing of theirs can land
in it any more.

Two things prove that, and nothing else does:

    the writer's own word    asked where it is registered, it answers, under its own id and epoch, that it is quiet
    a cut                    the links by which it wrote, one a host, are ended from this side: Transport.cut()

Whatever else there is instead of the word (silence, a refused connection, a later start of the same worker, somebody
else) is no proof and reason enough for the cut. A cut that proves nothing, since the writer has mapped this memory, is
made again until its process has let go; docs/faults.md says what bounds that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from service import logs
from spec.errors import TransferFailed, WorkerLost
from worker.receiver import Receiver, Request

logger = logs.get(__name__)

ASK_AGAIN_S = 1.0
ASK_TIMEOUT_S = 5.0  # a writer that lives and is not quiet by then is cut off, too


class Quarantine:
    """Of one worker. `find_record`: of a worker as it is registered now; None where it is not, or nobody can tell."""

    def __init__(
        self,
        cut: Callable[[str, Sequence[Request.Link]], None],
        open_channel: Callable[[str], grpc.aio.Channel],
        find_record: Callable[[str], Awaitable[worker_pb2.WorkerRecord | None]],
        proven: Callable[[str, float], None],
    ) -> None:
        """`cut(transport, links)`: as Transport.cut() of each does, and raises; called beside the event loop.
        `proven(proof, duration_s)` is told by what, "word" or "cut", and after how long."""
        self._cut = cut
        self._open_channel = open_channel
        self._find_record = find_record
        self._proven = proven
        self._held: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._held)

    def take(self, receiver: Receiver) -> None:
        """The memory of a stream that broke; freed when it is proven quiet."""
        task = asyncio.create_task(self._until_quiet(receiver))
        self._held.add(task)
        task.add_done_callback(self._held.discard)

    async def close(self) -> None:
        """Memory that is still not proven quiet goes with the process, and with it every way to write into it."""
        for task in self._held:
            task.cancel()

    async def _until_quiet(self, receiver: Receiver) -> None:
        assert receiver.ticket is not None and receiver.begin is not None
        broke_s = time.monotonic()
        receiver.writer_gone()
        while not (proof := await self._proof(receiver.ticket, receiver.begin)):
            await asyncio.sleep(ASK_AGAIN_S)
        receiver.quiet()
        self._proven(proof, time.monotonic() - broke_s)

    async def _proof(self, ticket: worker_pb2.Ticket, begin: Request.Begin) -> str:
        """That it is quiet; "" while there is none."""
        if await self._says_so(ticket, begin.producer_address):
            return "word"
        try:
            await asyncio.to_thread(self._cut, begin.transport, begin.links)
        except (TransferFailed, WorkerLost) as error:
            logger.warning("the memory of a hand-over from %s stays out of use: %s", ticket.producer_id, error.message)
            return ""
        logger.info("the link of %s, which did not say that it is quiet, was cut", ticket.producer_id)
        return "cut"

    async def _says_so(self, ticket: worker_pb2.Ticket, said_address: str) -> bool:
        """`said_address` comes from the stream: it is asked where the registry knows of no better."""
        record = await self._find_record(ticket.producer_id)
        is_registered = record is not None and record.epoch == ticket.producer_epoch
        channel = self._open_channel(record.address if record is not None and is_registered else said_address)
        request = worker_pb2.ConfirmQuietRequest(
            reservation_id=ticket.reservation_id,
            producer_id=ticket.producer_id,
            producer_epoch=ticket.producer_epoch,
        )
        try:
            answer = await worker_pb2_grpc.WorkerStub(channel).ConfirmQuiet(request, timeout=ASK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            logger.debug("%s cannot be asked whether it is quiet: %s", ticket.producer_id, error.code())
            return False
        finally:
            await channel.close()
        return self._is_the_writer(answer, ticket)

    def _is_the_writer(self, answer: worker_pb2.ConfirmQuietResponse, ticket: worker_pb2.Ticket) -> bool:
        return (answer.worker_id, answer.epoch) == (ticket.producer_id, ticket.producer_epoch)
