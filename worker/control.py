"""legato.v1.Worker, on every worker: what it is, what it counts, and how it is told to end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from worker.core import Core

POLL_S = 0.02


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """`live` are the pool's own counts beside the core's; `drain` makes it refuse new work."""

    def __init__(self, core: Core, live: Callable[[], dict[str, int]], drain: Callable[[], None]) -> None:
        self._core = core
        self._live = live
        self._drain = drain

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerRecord:
        return self._core.record

    async def GetCounts(
        self, request: worker_pb2.GetCountsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.Counts:
        with self._core.loop.lock:
            totals = self._core.scheduler.totals()
        return worker_pb2.Counts(live=self._core.live() | self._live(), total=totals, load=self._core.load())

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        self._drain()
        while any(self._live().values()):
            await asyncio.sleep(POLL_S)
        return worker_pb2.DrainResponse()
