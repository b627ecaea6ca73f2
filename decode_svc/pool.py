"""A decode worker, composed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from decode_svc.decode import DecodeService
from decode_svc.move import Moves
from decode_svc.placements import Placements
from legato.v1 import worker_pb2, worker_pb2_grpc
from scheduler.events import Event
from scheduler.plan import StepPlan
from service.channel import Channel, channel
from service.host import Host
from service.registry import connect, registered
from service.tracing import Spans
from worker.core import Core
from worker.handoffs import Handoffs
from worker.peers import Peers
from worker.prefix_sends import PrefixSends
from worker.quarantine import Quarantine


class DecodePool:
    service_name = "legato.v1.Decode"

    def __init__(self, core: Core, spans: Spans) -> None:
        self._placements = Placements(core, spans)
        self._redis = connect(core.config.redis_url)
        self._config = core.config
        self._peers = Peers(core.transports, self._open_channel, core.regions)
        self._quarantine = Quarantine(core.cut, self._open_channel, self._find_record, core.meter.quarantined)
        self.handoffs = Handoffs(self._placements, self._quarantine)
        self.prefix_sends = PrefixSends(core, self._peers)
        self._moves = Moves(self._placements, self._peers, spans)
        self._service = DecodeService(self._placements, self._moves)
        self._heartbeat = asyncio.create_task(self._placements.heartbeat())

    def add_to(self, host: Host) -> None:
        host.add(worker_pb2_grpc.add_DecodeServicer_to_server, self._service, self.service_name, internal=True)

    def deliver(self, events: Sequence[Event]) -> None:
        self._placements.deliver(events)

    def begin(self, plans: Sequence[StepPlan]) -> None:
        """Nothing leaves here while it is computed."""

    def tick(self, now_s: float) -> float | None:
        return self._placements.tick(now_s)

    def live(self) -> dict[str, int]:
        return {
            "decode.placed": len(self._placements.placed),
            "decode.attached": self._placements.subscriptions.attached,
            "decode.handoffs": self.handoffs.open_streams,
            "decode.quarantined": len(self._quarantine),
            "decode.moves": self._moves.under_way,
            "decode.prefix_sends": self.prefix_sends.under_way,
        }

    def drain(self) -> None:
        self._service.draining = True

    async def confirm_quiet(self, reservation_id: str) -> None:
        await self._moves.confirm_quiet(reservation_id)
        await self.prefix_sends.confirm_quiet(reservation_id)

    def _open_channel(self, address: str) -> Channel:
        return channel(address, self._config.cluster_key)

    async def _find_record(self, worker_id: str) -> worker_pb2.WorkerRecord | None:
        return await registered(self._redis, self._config.cluster, worker_id)

    def links(self) -> list[worker_pb2.PeerLink]:
        return self._peers.links()

    async def close(self) -> None:
        self._heartbeat.cancel()
        for subscription in self._placements.subscriptions.all:
            subscription.end()
        await self._quarantine.close()
        await self._moves.close()
        await self.prefix_sends.close()
        await self._peers.close()
        await self._redis.aclose()
