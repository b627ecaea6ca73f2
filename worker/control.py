"""legato.v1.Worker, on every worker: what it is, what it counts, and how it is told to end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from worker.core import Core
from worker.handoffs import Handoffs
from worker.prefix_sends import PrefixSends


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """`live` are the pool's own counts beside the core's, `links` what it measured of other workers; `drain` ends when
    nothing runs any more; `confirm_quiet` when nothing of that reservation is in flight from here. KV comes in by
    `handoffs`, prefixes go out by `prefix_sends`."""

    def __init__(
        self,
        core: Core,
        live: Callable[[], dict[str, int]],
        links: Callable[[], list[worker_pb2.PeerLink]],
        drain: Callable[[], Awaitable[None]],
        confirm_quiet: Callable[[str], Awaitable[None]],
        handoffs: Handoffs,
        prefix_sends: PrefixSends,
    ) -> None:
        self._core = core
        self._live = live
        self._links = links
        self._drain = drain
        self._confirm_quiet = confirm_quiet
        self._handoffs = handoffs
        self._prefix_sends = prefix_sends

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerRecord:
        return self._core.record

    async def GetCounts(
        self, request: worker_pb2.GetCountsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.Counts:
        live = self._core.live() | self._live()
        return worker_pb2.Counts(live=live, total=self._core.all_totals(), load=self._core.load(), links=self._links())

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        await self._drain()
        return worker_pb2.DrainResponse()

    async def ConfirmQuiet(
        self, request: worker_pb2.ConfirmQuietRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ConfirmQuietResponse:
        record = self._core.record
        if (request.producer_id, request.producer_epoch) == (record.worker_id, record.epoch):
            await self._confirm_quiet(request.reservation_id)
        return worker_pb2.ConfirmQuietResponse(worker_id=record.worker_id, epoch=record.epoch)

    async def Handoff(
        self, request_iterator: AsyncIterator[worker_pb2.HandoffRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.HandoffReply]:
        async for reply in self._handoffs.stream(request_iterator):
            yield reply

    async def SendPrefix(
        self, request: worker_pb2.SendPrefixRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.SendPrefixResponse:
        return worker_pb2.SendPrefixResponse(transfer=await self._prefix_sends.send(request))
