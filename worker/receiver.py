"""The receiving end of one hand-over: a stream of legato.v1.Worker.Handoff.

    Begin   ticket verified, reservation opened for writing  ──▶ Accepted
    Alive   the lease is renewed
    Landed  some layers of the next chunk are digested here
    Chunk   all that landed of it is, and compared           ──▶ (nothing, or Cancel)
    Final   plan complete: what it was reserved for goes on  ──▶ Admitted
    Quiet   nothing is in flight any more: blocks are freed

A stream that ends before Admitted or Quiet leaves memory that is not proven quiet, and so does a writer that was told
to stop and does not say Quiet in time; worker/quarantine.py has it then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

from kvtransfer import ticket as tickets
from kvtransfer.digest import DigestPolicy
from kvtransfer.routes import layout_id
from legato.v1 import worker_pb2
from scheduler.handoff import Reservation
from service import logs
from service.messages import with_adapter
from service.status import reason_to_proto
from service.wire import agreed
from spec.errors import (
    DigestMismatch,
    HandoffError,
    InvalidParameter,
    LegatoError,
    RequestCancelled,
    TicketRefused,
    TransferFailed,
    WireMismatch,
)
from worker.core import Core, CoreRank
from worker.landing import LandingCheck

logger = logs.get(__name__)

# Causes of a TicketRefused.
GIVEN_UP = "given up"  # by the router, while the hand-over was on its way: no refusal to count
NO_LINK = "no link"  # the writer is to connect anew

# From Cancel to Quiet. A writer that runs has given its transfers up by then (worker/departures.py); of one that hangs
# the stream stays open all the same, for gRPC's own threads keep it.
QUIET_TIMEOUT_S = 15.0

Request = worker_pb2.HandoffRequest
Reply = worker_pb2.HandoffReply


class Claim(Protocol):
    """What a hand-over is for."""

    reservation: Reservation | None  # None: it has ended
    cancel_writer: Callable[[LegatoError], None] | None  # set while a stream is open


class Claims(Protocol):
    """Who reserved blocks here, by the sequence id that the ticket names."""

    core: Core

    def claim(self, sequence_id: str) -> Claim | None: ...

    def give_up(self, sequence_id: str, reason: LegatoError) -> None:
        """The request failed: the reservation is failed, its writer cancelled. Unknown ids are fine."""
        ...

    async def admit(
        self, ticket: worker_pb2.Ticket, final: worker_pb2.HandoffRequest.Final, claimed: Callable[[], Claim]
    ) -> None:
        """All has landed: completes the reservation. `claimed()` raises TransferFailed once it is given up. Raises as
        Reservations.complete() does, TicketRefused for what the ticket was not issued for."""
        ...


class Receiver:
    """One hand-over. `replies` is what goes back to the writer; None ends the stream."""

    def __init__(self, claims: Claims) -> None:
        self.replies: asyncio.Queue[Reply | None] = asyncio.Queue()
        self.ticket: worker_pb2.Ticket | None = None
        self.begin: Request.Begin | None = None
        self._landing: LandingCheck | None = None  # of the chunk that is landing
        self.settled = False  # admitted, or quiet: the reservation is over
        self.out_of_patience = False  # the writer was told to stop, and has not said Quiet in time
        self._patience: asyncio.TimerHandle | None = None
        self._claims = claims
        self._core = claims.core

    async def receive(self, requests: AsyncIterator[Request]) -> None:
        """Takes the stream to its end. Raises TicketRefused for a ticket that opens nothing here."""
        steps: asyncio.Queue[Request | None] = asyncio.Queue()
        reading = asyncio.create_task(self._read(requests, steps))
        try:
            while (message := await steps.get()) is not None:
                match message.WhichOneof("event"):
                    case "chunk":
                        await self._guarded(self._landed(message.chunk))
                    case "landed":
                        await self._guarded(self._layers_landed(message.landed))
                    case "final":
                        await self._guarded(self._admit(message.final))
                    case "quiet":
                        self.quiet(finished_without_handoff=message.quiet.finished_without_handoff)
            await reading
        finally:
            reading.cancel()
            if self._patience is not None:
                self._patience.cancel()
            self.replies.put_nowait(None)
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[Request], steps: asyncio.Queue[Request | None]) -> None:
        """Steps wait in line. Signs of life do not: a step may outlast the lease."""
        try:
            async for message in requests:
                event = message.WhichOneof("event")
                if self.settled:
                    continue  # a sign of life that crossed our Admitted
                if (event == "begin") != (self.ticket is None):
                    raise TicketRefused("a hand-over begins once, and first")
                match event:
                    case "begin":
                        await self._open(message.begin)
                        self.replies.put_nowait(Reply(accepted=Reply.Accepted()))
                    case "alive":
                        await self._guarded(self._renew())
                    case _:
                        steps.put_nowait(message)
                if event == "quiet":
                    return
        finally:
            steps.put_nowait(None)

    async def _guarded(self, step: Awaitable[None]) -> None:
        """A hand-over that goes wrong ends the request and asks the writer to stop; the stream goes on until Quiet."""
        try:
            await step
        except (HandoffError, InvalidParameter) as error:
            assert self.ticket is not None
            if isinstance(error, TicketRefused | DigestMismatch) and self._ours() is not None:
                self._core.meter.refused(error)
                logger.warning("hand-over of %s refused: %s", self.ticket.sequence_id, error)
            self._give_up(error)

    async def _open(self, begin: Request.Begin) -> None:
        core = self._core
        try:
            ticket = tickets.verify(core.cluster_key, begin.ticket, now_unix_ns=time.time_ns())
            hosts = self._check(ticket)
            agreed(core.record.wire, begin.wire, ticket.producer_id)
            if ":" not in begin.producer_address:
                raise TicketRefused("the writer does not say where it can be asked whether it is quiet")
            if begin.transport not in core.transports or {link.host for link in begin.links} != hosts:
                raise TicketRefused("the writer does not say by which links it writes")
            is_open = await core.has_links(begin.transport, begin.links)
            for link, holds in zip(begin.links, is_open, strict=True):
                if not holds:  # a cut of it would prove nothing
                    raise TicketRefused(
                        "the link by which the writer wants to write is not open here", cause=NO_LINK, host=link.host
                    )
            self._check(ticket)  # it may have been given up meanwhile
            with core.loop.lock:
                core.reservations.begin(
                    ticket.reservation_id,
                    sequence_id=ticket.sequence_id,
                    producer_id=ticket.producer_id,
                    producer_epoch=ticket.producer_epoch,
                    block_ids=tuple(ticket.block_ids),
                    generations=tuple(ticket.block_generations),
                    now_s=time.monotonic(),
                )
        except (TicketRefused, WireMismatch) as error:
            if error.details.get("cause") != GIVEN_UP:
                core.meter.refused(error)
            raise
        self.ticket, self.begin = ticket, begin
        self._claimed().cancel_writer = self._cancel_writer

    def _check(self, ticket: worker_pb2.Ticket) -> set[int]:
        """The hosts that its blocks are on."""
        core = self._core
        if (ticket.consumer_id, ticket.consumer_epoch) != (core.record.worker_id, core.record.epoch):
            raise TicketRefused("the ticket is for another worker, or for this one before it restarted")
        claim = self._claims.claim(ticket.sequence_id)
        if claim is None:
            replayed = core.reservations.was_admitted(ticket.reservation_id)
            cause = "replayed" if replayed else GIVEN_UP
            raise TicketRefused(f"the reservation of this ticket has ended: {cause}", cause=cause)
        adapter = "" if claim.reservation is None else claim.reservation.adapter
        if ticket.identity != with_adapter(core.record.identity, adapter):
            raise TicketRefused("the ticket is for another model, adapter or revision")
        ranks = () if claim.reservation is None else core.ranks_of(claim.reservation.group)
        if not ranks or ticket.kv_layout_id != layout_id(ranks):
            raise TicketRefused("the ticket is for another KV layout")
        return {rank.host for rank in ranks}

    def _claimed(self) -> Claim:
        assert self.ticket is not None
        claim = self._ours()
        if claim is None:
            raise TransferFailed("the request was given up")
        return claim

    def _ours(self) -> Claim | None:
        """What was reserved under this stream's ticket; another claim of the same name is not its to touch."""
        assert self.ticket is not None
        claim = self._claims.claim(self.ticket.sequence_id)
        if claim is None or claim.reservation is None:
            return None
        return claim if claim.reservation.reservation_id == self.ticket.reservation_id else None

    def _give_up(self, reason: LegatoError) -> None:
        if self._ours() is not None:
            assert self.ticket is not None
            self._claims.give_up(self.ticket.sequence_id, reason)

    def _cancel_writer(self, error: LegatoError) -> None:
        cancel = Reply.Cancel(reason=reason_to_proto(error), message=error.message)
        self.replies.put_nowait(Reply(cancel=cancel))
        if self._patience is None:
            self._patience = asyncio.get_running_loop().call_later(QUIET_TIMEOUT_S, self._end_patience)

    def _end_patience(self) -> None:
        self.out_of_patience = True
        self.replies.put_nowait(None)

    async def _renew(self) -> None:
        self._claimed()
        assert self.ticket is not None
        with self._core.loop.lock:
            self._core.reservations.renew(self.ticket.reservation_id, time.monotonic())

    async def _layers_landed(self, landed: Request.Landed) -> None:
        """Digested while the other layers are on their way; nothing is told as there before its Chunk."""
        await self._renew()
        reservation, core, ticket = self._claimed().reservation, self._core, self.ticket
        assert ticket is not None and reservation is not None
        if DigestPolicy(core.config.handoff.digest_share).covers(ticket.reservation_id, landed.first_token):
            ranks = core.ranks_of(reservation.group)
            await self._check_of(ranks, landed.first_token, landed.num_tokens).take(landed.end_layer)

    async def _landed(self, chunk: Request.Chunk) -> None:
        reservation = self._claimed().reservation
        core, ticket = self._core, self.ticket
        assert ticket is not None and reservation is not None
        ranks = core.ranks_of(reservation.group)
        policy = DigestPolicy(core.config.handoff.digest_share)
        if is_digested := policy.covers(ticket.reservation_id, chunk.first_token):
            await self._check_of(ranks, chunk.first_token, chunk.num_tokens).compare(chunk.digests)
            self._landing = None
        with core.loop.lock:
            core.reservations.landed(ticket.reservation_id, chunk.first_token, chunk.num_tokens, time.monotonic())
        size, end = ranks[0].kv.layout.block_tokens, chunk.first_token + chunk.num_tokens
        await core.stage_in(ranks, list(ticket.block_ids[chunk.first_token // size : -(-end // size)]))
        if is_digested:
            with core.loop.lock:
                core.reservations.settled(ticket.reservation_id, chunk.first_token, chunk.num_tokens)

    def _check_of(self, ranks: Sequence[CoreRank], first_token: int, num_tokens: int) -> LandingCheck:
        """That goes on, or a new one."""
        check = self._landing
        if check is None or (check.first_token, check.num_tokens) != (first_token, num_tokens):
            assert self.ticket is not None
            blocks = tuple(self.ticket.block_ids)
            given = blocks, first_token, num_tokens
            self._landing = check = LandingCheck(ranks, self._core.digest_pool, *given, self._core.others)
        return check

    async def _admit(self, final: Request.Final) -> None:
        self._claimed()
        assert self.ticket is not None
        await self._claims.admit(self.ticket, final, self._claimed)
        self.settled = True
        self._core.loop.wake()
        self.replies.put_nowait(Reply(admitted=Reply.Admitted()))

    def quiet(self, *, finished_without_handoff: bool = False) -> None:
        """Nothing is in flight any more."""
        if self.ticket is None or self.settled:
            return
        self.settled = True
        with self._core.loop.lock:
            self._core.reservations.quiet(self.ticket.reservation_id, time.monotonic())
        self._core.loop.wake()  # somebody may wait for these blocks
        why: LegatoError = TransferFailed("the writer stopped")
        if finished_without_handoff:  # the router has that from the writer
            why = RequestCancelled("the sequence has ended where it was")
        self._give_up(why)

    @property
    def unproven(self) -> bool:
        """The stream was open for writing and said neither Final nor Quiet."""
        return self.ticket is not None and not self.settled

    def writer_gone(self) -> None:
        """The stream broke: the request fails, and its blocks stay out of use until quiet()."""
        if (claim := self._ours()) is not None:
            claim.cancel_writer = None
            self._give_up(TransferFailed("the writer left during the hand-over"))
