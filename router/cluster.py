"""What an operator sees of the cluster through this router, and the counts that must come back to rest (promise P3)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import grpc

from legato.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.inference import InferenceService
from router.line import Line
from router.meter import quantiles
from router.registry import Registry
from router.worker import Worker

IDLE_LOOK_S = 0.05

Cluster = inference_pb2.GetClusterResponse


class ClusterService(inference_pb2_grpc.ClusterServicer):
    """`reachable()` says whether Redis answers."""

    def __init__(
        self, registry: Registry, line: Line, inference: InferenceService, reachable: Callable[[], bool]
    ) -> None:
        self._registry = registry
        self._line = line
        self._inference = inference
        self._reachable = reachable

    async def GetCluster(
        self, request: inference_pb2.GetClusterRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GetClusterResponse:
        meter = self._inference.meter
        return Cluster(
            router_id=self._registry.router_id,
            workers=[view_of(worker) for _, worker in sorted(self._registry.workers.items())],
            router=Cluster.RouterView(
                waiting_requests=len(self._line),
                running_requests=meter.running_requests,
                finished_requests=meter.finished_requests,
                failed_requests=meter.failed_requests,
                ttft_s=quantiles(meter.ttft_s),
                itl_s=quantiles(meter.itl_s),
                registry_reachable=self._reachable(),
            ),
        )


def view_of(worker: Worker) -> inference_pb2.GetClusterResponse.WorkerView:
    record, load = worker.record, worker.load
    return Cluster.WorkerView(
        worker_id=record.worker_id,
        role="prefill" if worker.is_prefill else "decode",
        address=record.address,
        state=worker.state,
        waiting_requests=load.waiting_requests,
        running_requests=load.running_requests,
        charged_tokens=worker.charged_tokens,
        total_blocks=record.total_blocks,
        free_blocks=load.free_blocks,
        tokens_per_s=worker.tokens_per_s(),
        transferred_bytes=load.transferred_bytes,
        transport=record.endpoints[0].name if record.endpoints else "",
        steps=load.steps,
        preemptions=load.preemptions,
        refused_handoffs=load.refused_handoffs,
        moved_sequences=load.moved_sequences,
        quarantined_blocks=load.quarantined_blocks,
        pid=record.pid,
    )


class ControlService(worker_pb2_grpc.WorkerServicer):
    """legato.v1.Worker of the router itself: tests and operators ask all three servers the same way."""

    def __init__(self, registry: Registry, line: Line, inference: InferenceService) -> None:
        self._registry = registry
        self._line = line
        self._inference = inference

    async def Describe(
        self, request: worker_pb2.DescribeRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.WorkerRecord:
        """Only what a router has: its id and process."""
        draining = self._inference.draining
        return worker_pb2.WorkerRecord(worker_id=self._registry.router_id, pid=os.getpid(), draining=draining)

    async def GetCounts(
        self, request: worker_pb2.GetCountsRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.Counts:
        meter, workers = self._inference.meter, self._registry.workers.values()
        return worker_pb2.Counts(
            live={
                "requests": meter.running_requests,
                "waiting": len(self._line),
                "streams": sum(worker.routes for worker in workers),
                "charged_tokens": sum(worker.charged_tokens for worker in workers),
                "charged_requests": sum(worker.requests for worker in workers),
                "background_tasks": self._registry.tasks,
            },
            total={"finished_requests": meter.finished_requests, "failed_requests": meter.failed_requests},
            load=worker_pb2.WorkerLoad(
                waiting_requests=len(self._line), running_requests=meter.running_requests - len(self._line)
            ),
        )

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        self._inference.draining = True
        while self._inference.meter.running_requests:
            await asyncio.sleep(IDLE_LOOK_S)
        return worker_pb2.DrainResponse()
