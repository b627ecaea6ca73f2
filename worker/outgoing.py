"""How a worker opens the source end of a hand-over: what it checks before a byte of its KV may leave."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence

from kvtransfer import ticket as tickets
from kvtransfer.digest import DigestPolicy
from kvtransfer.routes import ranks_from_proto
from legato.v1 import worker_pb2, worker_pb2_grpc
from service.messages import layout_from_proto
from service.wire import agreed
from spec.errors import InvalidParameter, TicketRefused, TransferFailed
from worker.core import Core
from worker.departures import Target, Way
from worker.peers import Peers
from worker.sender import Sender
from worker.staging import SourceKV

ACCEPT_TIMEOUT_S = 5.0


def verified_ticket(core: Core, reservation: worker_pb2.Reservation) -> worker_pb2.Ticket:
    """Raises TicketRefused, counted."""
    with _refusals_counted(core):
        return tickets.verify(core.cluster_key, reservation.ticket, now_unix_ns=time.time_ns())


async def sender_for(
    core: Core,
    peers: Peers,
    ticket: worker_pb2.Ticket,
    reservation: worker_pb2.Reservation,
    address: str,
    identity: worker_pb2.ModelIdentity,
    token_ids: Sequence[int],
) -> Sender:
    """To the worker at `address`, for KV of exactly these tokens, this model and this process; not open yet.
    `ticket` is the reservation's, verified.

    Raises TicketRefused, counted, where the ticket is for anything else, WireMismatch where the two have no version in
    common, TransferFailed where no transport gets through, or where some of this worker's KV is on another host."""
    if core.num_hosts > 1:
        raise TransferFailed(
            f"ranks of {core.record.worker_id} are on {core.num_hosts} hosts: its KV does not leave it"
        )
    agreed(core.record.wire, reservation.wire, ticket.consumer_id)
    target_ranks = ranks_from_proto(layout_from_proto(reservation.kv_layout), reservation.ranks)
    with _refusals_counted(core):
        tickets.check_sender(
            ticket,
            identity=identity,
            target_ranks=target_ranks,
            producer_id=core.record.worker_id,
            producer_epoch=core.record.epoch,
            computed_prefix_digest=tickets.prefix_digest(identity, token_ids),
        )
    if not reservation.lease_s > 0:
        raise InvalidParameter(f"must be above 0, is {reservation.lease_s}", field="lease_s")
    share = reservation.digest_share if reservation.HasField("digest_share") else core.config.handoff.digest_share
    if not 0 <= share <= 1:
        raise InvalidParameter(f"must be in [0, 1], is {share}", field="digest_share")
    hosts = {rank.host for rank in target_ranks}
    endpoints = [endpoint for endpoint in reservation.endpoints if endpoint.host in hosts]
    name, connected = await peers.connect(ticket.consumer_id, ticket.consumer_epoch, endpoints)
    ways = tuple(Way(host, peer, peers.link(ticket.consumer_id, host)) for host, peer in connected.items())
    if connected.keys() != hosts:
        raise TransferFailed(f"{ticket.consumer_id} has ranks on hosts for which it names no endpoint")
    return Sender(
        worker_pb2_grpc.WorkerStub(await peers.channel(ticket.consumer_id, address)),
        SourceKV(core.ranks_of, core.regions[name], core.transports[name].register, core.stage_out),
        Target(ticket, reservation.ticket, target_ranks, ways, name, reservation.lease_s),
        core.record.address,
        core.digest_pool,
        DigestPolicy(share),
    )


def advance_in_pieces(
    core: Core, sender: Sender, group: int, block_table: tuple[int, ...], ticket: worker_pb2.Ticket
) -> None:
    """All that the ticket asks for is in `block_table` of `group`: it leaves a step's worth at a time, so that few
    blocks are staged at once. Each piece is held until it is told; the caller holds the table, or the loop's lock."""
    first, end, size = ticket.first_token, ticket.num_tokens, core.record.kv_layout.block_tokens
    piece = max(core.record.max_step_tokens // size, 1) * size
    while first < end:
        up_to = min(first - first % size + piece, end)
        blocks = block_table[first // size : -(-up_to // size)]
        core.hold(group, blocks)
        sender.advance(up_to, group, block_table, functools.partial(core.unhold, group, blocks))
        first = up_to


@contextlib.contextmanager
def _refusals_counted(core: Core) -> Iterator[None]:
    try:
        yield
    except TicketRefused as error:
        core.meter.refused(error)
        raise
