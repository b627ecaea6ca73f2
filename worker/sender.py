"""The source end of one hand-over: its stream; what leaves under it is worker/departures.py.

    open()      Begin ──▶ Accepted             no byte is written before it, none outside the stream's life
    begin()     a step computes a chunk        its blocks are held from here on
    reached()   layers of it are written       they leave
    computed()  the step is committed          Chunk ──▶ once all of it has landed
    sent()      every chunk was told
    finish()    Final ──▶ Admitted             the decode worker has the sequence
    close()     Quiet ──▶                      proven: nothing is in flight; the decode worker may free its blocks

A held block keeps its content until its chunk is told, whatever happens to the sequence meanwhile: what the digest
covers is what was sent.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable

import grpc

from kvtransfer.digest import DigestPolicy
from legato.v1 import worker_pb2, worker_pb2_grpc
from legato.v1.common_pb2 import TransferStats
from service import logs
from service.status import error_from_reason, error_from_rpc
from service.wire import spoken
from spec.errors import HandoffError, LegatoError, RequestCancelled, TransferFailed
from worker.departures import Departures, Target, Way
from worker.receiver import NO_LINK
from worker.staging import SourceKV, Staging

logger = logs.get(__name__)

ALIVE_SHARE = 0.25  # of the lease, between two signs of life
ASK_AGAIN_S = 1.0  # whether a peer that did not confirm is quiet now
LAST_WORD_S = 1.0  # how long the end of the stream is waited for


class Sender:
    """Owned by one Prefill call, one move or one fetch. Not thread-safe: every method runs in the event loop."""

    def __init__(
        self,
        stub: worker_pb2_grpc.WorkerStub,
        source: SourceKV,
        target: Target,
        producer_address: str,
        pool: concurrent.futures.Executor,
        policy: DigestPolicy,
    ) -> None:
        self.failed: asyncio.Future[LegatoError] = asyncio.get_running_loop().create_future()
        self._stub = stub
        self._target = target
        self._staging = Staging(source, target.ranks, pool)
        self._departures = Departures(target, self._staging, policy, pool, self._write, self.failed)
        self._producer_address = producer_address
        self._gone: tuple[Way, ...] = ()  # the owner has that link no more, whatever it looks like from here
        self._admitted = asyncio.Event()
        self._writing = asyncio.Lock()  # a stream takes one write at a time
        self._tasks: list[asyncio.Task[None]] = []
        self._call: grpc.aio.StreamStreamCall | None = None

    async def open(self, timeout_s: float) -> None:
        """Raises the HandoffError that the decode worker refused with, TransferFailed when it cannot be asked."""
        self._call, target = self._stub.Handoff(), self._target
        begin = worker_pb2.HandoffRequest.Begin(
            ticket=target.signed,
            producer_address=self._producer_address,
            wire=spoken(),
            transport=target.transport,
            links=[worker_pb2.HandoffRequest.Link(host=way.host, link_id=way.peer.link_id) for way in target.ways],
        )
        try:
            async with asyncio.timeout(timeout_s):
                await self._call.write(worker_pb2.HandoffRequest(begin=begin))
                reply = await self._call.read()
                while reply is not grpc.aio.EOF and reply.WhichOneof("event") is None:
                    reply = await self._call.read()  # what a newer version may say, and we may pass over
        except grpc.aio.AioRpcError as error:
            raise self._refusal(error) from error
        except TimeoutError:
            self._call.cancel()
            raise TransferFailed(
                f"{self._target.ticket.consumer_id} did not accept the hand-over in {timeout_s} s"
            ) from None
        if reply is grpc.aio.EOF:
            raise self._refusal(await _status_of(self._call))
        if reply.HasField("cancel"):
            raise error_from_reason(reply.cancel.reason, reply.cancel.message)
        work = self._listen(), self._departures.run(), self._stay_alive()
        self._tasks = [asyncio.create_task(each) for each in work]

    @property
    def first_write_ns(self) -> int:
        """0: nothing has left yet."""
        return self._departures.first_write_ns

    def begin(self, end: int, group: int, block_table: tuple[int, ...], release: Callable[[], None]) -> None:
        """KV of tokens [0, end) is being brought into `block_table` of `group`, whose blocks are held until `release`
        is called."""
        self._departures.begin(end, group, block_table, release)

    def reached(self, end: int, layers: int) -> None:
        """Of the chunk that ends at token `end` the model's layers [0, layers) are written."""
        self._departures.reached(end, layers)

    def computed(self, end: int) -> None:
        """The chunk that ends at token `end` is, and counts."""
        self._departures.computed(end)

    def _refusal(self, error: grpc.aio.AioRpcError) -> HandoffError:
        """What the decode worker says of the hand-over; all else is about the way there, and not about this worker."""
        found = error_from_rpc(error)
        if found.details.get("cause") == NO_LINK:
            self._gone = tuple(way for way in self._target.ways if str(way.host) == found.details.get("host"))
        if isinstance(found, HandoffError):
            return found
        return TransferFailed(f"{self._target.ticket.consumer_id} did not accept the hand-over: {found.message}")

    def advance(self, end: int, group: int, block_table: tuple[int, ...], release: Callable[[], None]) -> None:
        """begin() and computed() of what is in the blocks already."""
        self.begin(end, group, block_table, release)
        self.computed(end)

    async def sent(self) -> None:
        """Waits until all that begun is told; nothing more may begin. Raises why it was given up."""
        self._departures.end()
        await self._or_failed(self._tasks[1])

    def give_up(self, error: LegatoError) -> None:
        """Ends what waits here with this error; close() follows."""
        self._fail(error)

    async def finish(self, state: worker_pb2.SequenceState | None) -> TransferStats:
        """Waits for the last chunk, hands the sequence state over and waits until the decode worker has admitted it.
        None: it is a prefix that was asked for, and nothing more."""
        await self.sent()
        await self._write(worker_pb2.HandoffRequest(final=worker_pb2.HandoffRequest.Final(sequence=state)))
        await self._or_failed(asyncio.ensure_future(self._admitted.wait()))
        return self._departures.stats

    async def close(self, *, finished_without_handoff: bool = False) -> None:
        """Returns when what was in flight has landed or can land no more, however long that takes, and says Quiet only
        then. After finish() it only ends the stream."""
        if self._call is None:
            return
        self._departures.end()
        if self._tasks and not self._tasks[1].done():
            self._fail(RequestCancelled("the hand-over was given up"))
            await asyncio.wait([self._tasks[1]])
        for task in self._tasks[1:]:
            task.cancel()
        while self._departures.unproven:
            way = next(iter(self._departures.unproven))
            try:
                await way.link.release(way.peer)
                self._departures.unproven.discard(way)
            except TransferFailed as error:
                logger.warning("the hand-over to %s is not proven quiet: %s", self._target.ticket.consumer_id, error)
                await asyncio.sleep(ASK_AGAIN_S)
        for way in self._gone:
            with contextlib.suppress(TransferFailed):  # it is not taken again: the next hand-over connects anew
                await way.link.release(way.peer)
        await asyncio.to_thread(self._staging.release)  # a transport may have to wait
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            async with self._writing:
                if not self._admitted.is_set():
                    quiet = worker_pb2.HandoffRequest.Quiet(finished_without_handoff=finished_without_handoff)
                    await self._call.write(worker_pb2.HandoffRequest(quiet=quiet))
                await self._call.done_writing()
        if self._tasks:
            await asyncio.wait(self._tasks[:1], timeout=LAST_WORD_S)  # the peer ends the stream once it has read that
            self._tasks[0].cancel()
        self._call.cancel()

    def _fail(self, error: LegatoError) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    async def _or_failed(self, task: asyncio.Future[None] | asyncio.Task[bool]) -> None:
        try:
            await asyncio.wait([task, self.failed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            if task not in self._tasks:
                task.cancel()
        if self.failed.done():
            raise self.failed.result()

    async def _write(self, message: worker_pb2.HandoffRequest) -> None:
        assert self._call is not None
        try:
            async with self._writing:
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._fail(TransferFailed(f"{self._target.ticket.consumer_id} left during the hand-over"))
            raise self.failed.result() from None

    async def _listen(self) -> None:
        """Admitted or Cancel; the end of the stream before Admitted is a lost peer."""
        assert self._call is not None
        try:
            while (reply := await self._call.read()) is not grpc.aio.EOF:
                if reply.HasField("admitted"):
                    self._admitted.set()
                elif reply.HasField("cancel"):
                    self._fail(error_from_reason(reply.cancel.reason, reply.cancel.message))
        except grpc.aio.AioRpcError as error:
            logger.debug("hand-over stream to %s ended: %s", self._target.ticket.consumer_id, error.code())
        if not self._admitted.is_set():
            self._fail(TransferFailed(f"{self._target.ticket.consumer_id} left during the hand-over"))

    async def _stay_alive(self) -> None:
        """The reservation's lease outlives a long line and a long chunk."""
        while not self.failed.done() and not self._admitted.is_set():
            await asyncio.sleep(self._target.lease_s * ALIVE_SHARE)
            with contextlib.suppress(LegatoError):
                await self._write(worker_pb2.HandoffRequest(alive=worker_pb2.HandoffRequest.Alive()))


async def _status_of(call: grpc.aio.StreamStreamCall) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
    )
