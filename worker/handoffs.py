"""All hand-overs to a worker, and the quarantine of those whose stream broke.

A stream that ends before Admitted or Quiet leaves memory that is not proven quiet. Then the writer is asked: a living
one answers when it is quiet, one that restarted where it was has a later epoch, one that is gone refuses the
connection. Until one of the three is known, the blocks stay out of use and are counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from worker.receiver import Claims, Receiver, Reply, Request

ASK_AGAIN_S = 1.0
ASK_TIMEOUT_S = 5.0
LINGER_S = 1.0  # what a dead writer's machine had taken from it may land for so long


class Handoffs:
    """All open streams, and the memory of broken ones that is not proven quiet yet."""

    def __init__(
        self,
        claims: Claims,
        open_channel: Callable[[str], grpc.aio.Channel],
        find_record: Callable[[str], Awaitable[worker_pb2.WorkerRecord | None]],
    ) -> None:
        """`find_record`: of a worker as it is registered now; None where it is not, or nobody can tell."""
        self.open_streams = 0
        self._find_record = find_record
        self._claims = claims
        self._open_channel = open_channel
        self._quarantine: set[asyncio.Task[None]] = set()

    @property
    def quarantined(self) -> int:
        return len(self._quarantine)

    async def close(self) -> None:
        """Memory that is still not proven quiet goes with the process, and with it every way to write into it."""
        for task in self._quarantine:
            task.cancel()

    async def stream(self, requests: AsyncIterator[Request]) -> AsyncIterator[Reply]:
        receiver = Receiver(self._claims)
        reading = asyncio.create_task(receiver.receive(requests))
        self.open_streams += 1
        try:
            while (reply := await receiver.replies.get()) is not None:
                yield reply
            await reading
        finally:
            self.open_streams -= 1
            reading.cancel()
            await asyncio.wait([reading])
            if receiver.unproven:
                task = asyncio.create_task(self._until_quiet(receiver))
                self._quarantine.add(task)
                task.add_done_callback(self._quarantine.discard)

    async def _until_quiet(self, receiver: Receiver) -> None:
        """After a broken stream: asks the writer until its memory is known to be quiet."""
        assert receiver.ticket is not None and receiver.begin is not None
        receiver.writer_gone()
        while not await self._is_quiet(receiver.begin.producer_address, receiver.ticket):
            await asyncio.sleep(ASK_AGAIN_S)
        await asyncio.sleep(LINGER_S)
        receiver.quiet()

    async def _is_quiet(self, address: str, ticket: worker_pb2.Ticket) -> bool:
        """Silence proves nothing; any of these does: a later start of the same worker has the same address, the writer
        or its successor there says so, no process listens there, or one that is no worker of this cluster. Another
        start elsewhere may run beside the writer."""
        record = await self._find_record(ticket.producer_id)
        if record is not None and record.epoch > ticket.producer_epoch and record.address == address:
            return True
        channel = self._open_channel(address)
        request = worker_pb2.ConfirmQuietRequest(reservation_id=ticket.reservation_id)
        try:
            await worker_pb2_grpc.WorkerStub(channel).ConfirmQuiet(request, timeout=ASK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return "refused" in (error.details() or "").lower()
            return error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED)
        finally:
            await channel.close()
        return True
