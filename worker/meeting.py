"""Workers meet when they join: a prefill worker learns of decode workers from the registry, connects to each ahead of
the first request, measures what both have, and says what it took.

A worker that was started again, on the same address or another, is known by its epoch: it is met anew at the next look
after its registration. One that cannot be reached is tried again; no failure here ends anything.
"""

from __future__ import annotations

import asyncio

from kvtransfer.probing import is_rdma
from legato.v1 import worker_pb2
from service import logs
from service.registry import Watcher
from service.wire import agreed
from spec.errors import LegatoError, WireMismatch
from worker.core import Core
from worker.peers import Met, Peers

logger = logs.get(__name__)

LOOK_S = 0.25
FORGET_S = 60.0  # a worker that has been out of the registry for so long does not come back under its name
AGAIN_S = 5.0  # after a meeting that failed, and before one whose connection was lost is met again


class Meetings:
    """Owned by the pool; runs from the first moment of its event loop until close()."""

    def __init__(self, core: Core, peers: Peers) -> None:
        self._core = core
        self._peers = peers
        self._not_before_s: dict[str, tuple[int, float]] = {}  # worker -> epoch, when it may be met again
        self._gone_since_s: dict[str, float] = {}
        self._under_way: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._look_around(), name="meetings")

    async def close(self) -> None:
        tasks = [self._task, *self._under_way]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _look_around(self) -> None:
        config = self._core.config
        async with Watcher(config.redis_url, config.cluster) as watcher:
            while True:
                for worker_id in self._not_before_s.keys() - watcher.workers.keys():
                    del self._not_before_s[worker_id]
                await self._forget(self._peers.known() - watcher.workers.keys())
                for record in watcher.workers.values():
                    self._look_at(record)
                await asyncio.sleep(LOOK_S)

    async def _forget(self, gone: set[str]) -> None:
        now_s = asyncio.get_running_loop().time()
        self._gone_since_s = {worker_id: self._gone_since_s.get(worker_id, now_s) for worker_id in gone}
        for worker_id, since_s in self._gone_since_s.items():
            if now_s - since_s >= FORGET_S:
                await self._peers.forget(worker_id)

    def _look_at(self, record: worker_pb2.WorkerRecord) -> None:
        ours, now_s = self._core.record, asyncio.get_running_loop().time()
        takes_kv = record.role == worker_pb2.DECODE and record.identity == ours.identity and record.endpoints
        if not takes_kv or record.worker_id == ours.worker_id:
            return
        epoch, not_before_s = self._not_before_s.get(record.worker_id, (0, 0.0))
        if epoch == record.epoch and (now_s < not_before_s or self._peers.is_connected(record)):
            return
        self._not_before_s[record.worker_id] = record.epoch, now_s + AGAIN_S
        task = asyncio.create_task(self._meet(record))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _meet(self, record: worker_pb2.WorkerRecord) -> None:
        ours = self._core.record
        try:
            agreed(ours.wire, record.wire, record.worker_id)
            met = await self._peers.meet(record)
        except WireMismatch as error:
            self._not_before_s[record.worker_id] = record.epoch, float("inf")
            logger.warning("%s is not paired: %s", record.worker_id, error)
        except LegatoError as error:
            logger.warning("%s at %s was not met: %s", record.worker_id, record.address, error)
        else:
            for each in met:
                self._say(record, each)

    def _say(self, record: worker_pb2.WorkerRecord, met: Met) -> None:
        ours = self._core.record
        if met.measured is not None:
            self._core.meter.met(met.transport, met.runs_over, met.measured)
            logger.info(
                "met %s%s: %s over %s, %.2f GB/s, %.0f us",
                record.worker_id,
                f" (host {met.host})" if met.host else "",
                met.transport,
                met.runs_over,
                met.measured.bytes_per_s / 1e9,
                met.measured.latency_s * 1e6,
            )
        falls_short = met.runs_over.startswith("tcp") and not is_rdma(met.runs_over)
        if falls_short and ours.rdma_devices and record.rdma_devices:
            logger.warning(
                "%s at %s and %s at %s both have RDMA (%s; %s), but KV between them goes over TCP",
                *(ours.worker_id, ours.address, record.worker_id, record.address),
                *(", ".join(ours.rdma_devices), ", ".join(record.rdma_devices)),
            )
