"""A prompt's prefix that the decode worker holds and this worker does not: fetched from there, where that is cheaper
than to compute it again (a conversation goes on; a hand-over broke and another prefill worker takes it up).

    our own reservation, with the decode worker as its writer ──▶ SendPrefix ──▶ Handoff, in the other direction
    ──▶ Final without a sequence: the blocks are prefix content, and the sequence finds them as any prefix

Whatever goes wrong, the prompt is computed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from legato.v1.common_pb2 import TransferStats
from scheduler.fetching import is_fetch_cheaper
from scheduler.handoff import Reservation
from scheduler.sequence import Sequence as Running
from service import logs
from service.messages import layout_from_proto
from service.status import error_from_rpc
from spec.errors import LegatoError, RequestCancelled, TicketRefused, TransferFailed
from worker.core import Core
from worker.peers import Peers
from worker.receiver import Claim
from worker.reserving import reservation_to_proto

logger = logs.get(__name__)

GRACE_S = 1.0  # beyond what computing would have taken, before a fetch is given up


@dataclasses.dataclass(slots=True)
class Fetch:
    reservation: Reservation | None
    cancel_writer: Callable[[LegatoError], None] | None = None


class Fetches:
    """All that are under way; worker/receiver.py's Claims. Owned by the process; used in the event loop, but for
    `tick`."""

    def __init__(self, core: Core, peers: Peers) -> None:
        self.core = core
        self._peers = peers
        self._fetches: dict[str, Fetch] = {}
        self._bytes_per_s: dict[str, float] = {}  # of the link to a worker, as it was last found
        self._token_bytes = layout_from_proto(core.record.kv_layout).token_bytes
        self._event_loop = asyncio.get_running_loop()

    @property
    def under_way(self) -> int:
        return len(self._fetches)

    def note(self, worker_id: str, stats: TransferStats) -> None:
        """What a hand-over to or from that worker found of the link."""
        if stats.bytes and stats.moving_s > 0:
            self._bytes_per_s[worker_id] = stats.bytes / stats.moving_s

    async def fetch(
        self, sequence: Running, held: worker_pb2.Ticket, layout: worker_pb2.KVLayout, address: str
    ) -> None:
        """`held`: the decode worker's own ticket, which says what it holds of the sequence's tokens, in blocks of
        `layout`. Raises nothing for what goes wrong between the workers."""
        core = self.core
        tokens = sequence.tokens(0, held.first_token)
        end = held.first_token - held.first_token % core.record.kv_layout.block_tokens
        if layout.dtype != core.record.kv_layout.dtype or not self._is_cheaper(tokens[:end], sequence, held):
            return
        name = f"{held.sequence_id}/prefix"
        try:
            with core.loop.lock:
                reservation = core.reservations.reserve(
                    name,
                    tokens[:end],
                    producer_id=held.consumer_id,
                    producer_epoch=held.consumer_epoch,
                    deadline_s=sequence.deadline_s,
                    now_s=time.monotonic(),
                    adapter=sequence.adapter,
                )
            self._fetches[name] = Fetch(reservation)
            core.loop.wake()  # its lease is due one day
            request = worker_pb2.SendPrefixRequest(
                reservation=reservation_to_proto(core, reservation, tokens[:end], held.expires_unix_ns),
                token_ids=tokens,
                adapter=sequence.adapter,
                address=core.record.address,
            )
            stub = worker_pb2_grpc.WorkerStub(await self._peers.channel(held.consumer_id, address))
            limit_s = GRACE_S + (end - reservation.held_tokens) * (core.meter.seconds_per_token or 0.0)
            answer = await stub.SendPrefix(request, timeout=limit_s)
            self.note(held.consumer_id, answer.transfer)
            core.meter.fetched(answer.transfer.sent_tokens)
        except grpc.aio.AioRpcError as rpc_error:
            logger.info("the prefix of %s is computed: %s", held.sequence_id, error_from_rpc(rpc_error).message)
        except LegatoError as error:
            logger.info("the prefix of %s is computed: %s", held.sequence_id, error.message)
        finally:
            self.give_up(name, RequestCancelled("the prefix is not waited for any more"))

    def _is_cheaper(self, tokens: Sequence[int], sequence: Running, held: worker_pb2.Ticket) -> bool:
        core = self.core
        with core.loop.lock:
            lane = core.scheduler.lightest(tokens, sequence.adapter)
            known = lane.prefix.count(lane.prefix.hashes(tokens, sequence.adapter))
        missing = len(tokens) - known * lane.config.block_tokens
        link = self._bytes_per_s.get(held.consumer_id)
        return is_fetch_cheaper(missing, self._token_bytes, link, core.meter.seconds_per_token)

    # ---- as Claims ----

    def claim(self, sequence_id: str) -> Fetch | None:
        return self._fetches.get(sequence_id)

    def give_up(self, sequence_id: str, reason: LegatoError) -> None:
        fetch = self._fetches.pop(sequence_id, None)
        if fetch is None or fetch.reservation is None:
            return
        with self.core.loop.lock:
            self.core.reservations.fail(fetch.reservation.reservation_id, reason.reason, time.monotonic())
        if fetch.cancel_writer is not None:
            fetch.cancel_writer(reason)
        self.core.loop.wake()

    async def admit(
        self, ticket: worker_pb2.Ticket, final: worker_pb2.HandoffRequest.Final, claimed: Callable[[], Claim]
    ) -> None:
        """The blocks are prefix content, and nobody's."""
        if final.HasField("sequence"):
            raise TicketRefused("a prefix was asked for, and no sequence")
        reservation = claimed().reservation
        assert reservation is not None
        with self.core.loop.lock:
            blocks = self.core.reservations.complete(ticket.reservation_id, time.monotonic())
            self.core.scheduler.unhold(reservation.group, blocks)
        del self._fetches[ticket.sequence_id]

    # ---- leases ----

    def tick(self, now_s: float) -> float | None:
        """In the engine loop's thread, its lock held: ends what outlived its lease; says when the next lease is due."""
        if expired := self.core.reservations.expire(now_s):
            self._event_loop.call_soon_threadsafe(self._lease_ended, expired)
        return self.core.reservations.next_expiry_s()

    def _lease_ended(self, reservation_ids: Sequence[str]) -> None:
        for name, fetch in list(self._fetches.items()):
            if fetch.reservation is not None and fetch.reservation.reservation_id in reservation_ids:
                self.give_up(name, TransferFailed("no sign of the writer within the lease"))
