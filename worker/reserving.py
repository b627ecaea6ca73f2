"""A reservation as its writer is told of it: the ticket that binds it to its content, and where its blocks lie."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer import ticket as tickets
from kvtransfer.routes import layout_id, ranks_to_proto
from legato.v1 import worker_pb2
from scheduler.handoff import Reservation
from service.messages import with_adapter
from worker.core import Core


def reservation_to_proto(
    core: Core, reservation: Reservation, token_ids: Sequence[int], expires_unix_ns: int
) -> worker_pb2.Reservation:
    """`token_ids`: those that it was reserved for."""
    return worker_pb2.Reservation(
        ticket=signed_ticket(core, reservation, token_ids, expires_unix_ns),
        kv_layout=core.record.kv_layout,
        endpoints=core.record.endpoints,
        lease_s=core.config.handoff.lease_s,
        ranks=ranks_to_proto(core.ranks_of(reservation.group)),
        wire=core.record.wire,
        digest_share=core.config.handoff.digest_share,
    )


def signed_ticket(
    core: Core, reservation: Reservation, token_ids: Sequence[int], expires_unix_ns: int
) -> worker_pb2.SignedTicket:
    identity = with_adapter(core.record.identity, reservation.adapter)
    ticket = worker_pb2.Ticket(
        reservation_id=reservation.reservation_id,
        sequence_id=reservation.sequence_id,
        prefix_digest=tickets.prefix_digest(identity, token_ids),
        num_tokens=reservation.num_tokens,
        identity=identity,
        kv_layout_id=layout_id(core.ranks_of(reservation.group)),
        producer_id=reservation.producer_id,
        producer_epoch=reservation.producer_epoch,
        consumer_id=core.record.worker_id,
        consumer_epoch=core.record.epoch,
        block_ids=reservation.block_ids,
        block_generations=reservation.generations,
        first_token=reservation.held_tokens,
        expires_unix_ns=expires_unix_ns,
    )
    return tickets.issue(core.cluster_key, ticket)
