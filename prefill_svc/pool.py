"""A prefill worker, composed."""

from __future__ import annotations

from collections.abc import Sequence

from legato.v1 import worker_pb2_grpc
from prefill_svc.prefill import PrefillService
from scheduler.events import Event
from scheduler.plan import StepPlan
from service.channel import channel
from service.host import Host
from service.tracing import Spans
from worker.core import Core
from worker.peers import Peers
from worker.watch import StepWatch


class PrefillPool:
    service_name = "legato.v1.Prefill"

    def __init__(self, core: Core, spans: Spans) -> None:
        self._peers = Peers(core.transports, lambda address: channel(address, core.config.cluster_key))
        self._service = PrefillService(core, self._peers, spans)

    def add_to(self, host: Host) -> None:
        host.add(worker_pb2_grpc.add_PrefillServicer_to_server, self._service, self.service_name, internal=True)

    def deliver(self, events: Sequence[Event]) -> None:
        self._service.deliver(events)

    def begin(self, plans: Sequence[StepPlan]) -> StepWatch | None:
        return self._service.begin(plans)

    def tick(self, now_s: float) -> None:
        """Nothing here is leased."""

    def live(self) -> dict[str, int]:
        return self._service.live()

    def drain(self) -> None:
        self._service.draining = True

    async def confirm_quiet(self, reservation_id: str) -> None:
        await self._service.confirm_quiet(reservation_id)

    async def close(self) -> None:
        await self._peers.close()
