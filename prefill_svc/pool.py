"""A prefill worker, composed."""

from __future__ import annotations

from collections.abc import Sequence

from legato.v1 import worker_pb2, worker_pb2_grpc
from prefill_svc.fetch import Fetches
from prefill_svc.prefill import PrefillService
from scheduler.events import Event
from scheduler.plan import StepPlan
from service.channel import Channel, channel
from service.host import Host
from service.registry import connect, registered
from service.tracing import Spans
from worker.core import Core
from worker.handoffs import Handoffs
from worker.meeting import Meetings
from worker.peers import Peers
from worker.prefix_sends import PrefixSends
from worker.quarantine import Quarantine
from worker.watch import StepWatch


class PrefillPool:
    service_name = "legato.v1.Prefill"

    def __init__(self, core: Core, spans: Spans) -> None:
        self._redis = connect(core.config.redis_url)
        self._config = core.config
        self._peers = Peers(core.transports, self._open_channel, core.regions)
        self._meetings = Meetings(core, self._peers)
        self._fetches = Fetches(core, self._peers)
        self._quarantine = Quarantine(core.cut, self._open_channel, self._find_record, core.meter.quarantined)
        self.handoffs = Handoffs(self._fetches, self._quarantine)
        self.prefix_sends = PrefixSends(core, self._peers)
        self._service = PrefillService(core, self._peers, self._fetches, spans)

    def add_to(self, host: Host) -> None:
        host.add(worker_pb2_grpc.add_PrefillServicer_to_server, self._service, self.service_name, internal=True)

    def deliver(self, events: Sequence[Event]) -> None:
        self._service.deliver(events)

    def begin(self, plans: Sequence[StepPlan]) -> StepWatch | None:
        return self._service.begin(plans)

    def tick(self, now_s: float) -> float | None:
        return self._fetches.tick(now_s)

    def live(self) -> dict[str, int]:
        return self._service.live() | {
            "prefill.fetches": self._fetches.under_way,
            "prefill.handoffs": self.handoffs.open_streams,
            "prefill.quarantined": len(self._quarantine),
            "prefill.prefix_sends": self.prefix_sends.under_way,
        }

    def drain(self) -> None:
        self._service.draining = True

    async def confirm_quiet(self, reservation_id: str) -> None:
        await self._service.confirm_quiet(reservation_id)
        await self.prefix_sends.confirm_quiet(reservation_id)

    def _open_channel(self, address: str) -> Channel:
        return channel(address, self._config.cluster_key)

    async def _find_record(self, worker_id: str) -> worker_pb2.WorkerRecord | None:
        return await registered(self._redis, self._config.cluster, worker_id)

    def links(self) -> list[worker_pb2.PeerLink]:
        return self._peers.links()

    async def close(self) -> None:
        await self._meetings.close()
        await self._quarantine.close()
        await self.prefix_sends.close()
        await self._peers.close()
        await self._redis.aclose()
