"""The source end of a move: a running sequence goes on at another decode worker, which has reserved blocks for it.

    open        the ticket is for tokens that the sequence has, their KV is computed; the target accepts
    send        blocks leave piece by piece, held, while the sequence goes on here
    take out    at a step boundary: no token more is drawn here
    hand over   Final with its whole state ──▶ Admitted: its last message here says that it moved

Whatever goes wrong before Admitted, the sequence is put back and goes on here; the target's reservation is given up by
the router. It may be that the target has the sequence all the same (Admitted was lost): then both draw for a moment,
and the router, which hears only one of them, stops the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from decode_svc.placements import Placements
from legato.v1 import worker_pb2
from legato.v1.common_pb2 import TransferStats
from scheduler.events import Computed, Event, Preempted, Tokens
from scheduler.lifetime import Stage
from scheduler.sequence import Sequence
from service.tracing import Spans
from spec.errors import LegatoError, RequestCancelled, TransferFailed
from telemetry import names
from worker.outgoing import ACCEPT_TIMEOUT_S, advance_in_pieces, sender_for, verified_ticket
from worker.peers import Peers
from worker.sender import Sender
from worker.sequences import identity_of, sequence_to_proto

ADMIT_TIMEOUT_S = 2.0  # no token is drawn meanwhile

Result = TypeVar("Result")


class Move:
    """One move of one sequence."""

    def __init__(
        self, request: worker_pb2.MoveRequest, ticket: worker_pb2.Ticket, placements: Placements, peers: Peers
    ) -> None:
        self.ticket = ticket
        self.closed = asyncio.Event()
        self._request = request
        self._placements = placements
        self._core = placements.core
        self._peers = peers
        self._sender: Sender | None = None
        self._stopped: asyncio.Future[bool] = asyncio.get_running_loop().create_future()  # True: held; False: ended
        self._taking_out = False
        self._admitted = False

    async def run(self) -> TransferStats:
        """Raises the LegatoError for which the sequence stays; put_back() and close() must follow."""
        sequence_id = self._request.sequence_id
        self._placements.watch(sequence_id, self._hear)
        _, sequence = self._computed()
        state = sequence_to_proto(sequence, self.ticket.sequence_id)
        tokens = (*state.prompt_token_ids, *state.output_token_ids)[: self.ticket.num_tokens]
        identity = identity_of(state, self._core.record)
        sender = self._sender = await sender_for(
            self._core,
            self._peers,
            self.ticket,
            self._request.reservation,
            self._request.target_address,
            identity,
            tokens,
        )
        await self._unless_ended(sender.open(ACCEPT_TIMEOUT_S))
        self._send(sender)
        await self._unless_ended(sender.sent())
        self._take_out()
        first: set[asyncio.Future[Any]] = {self._stopped, sender.failed}
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        if sender.failed.done():
            raise sender.failed.result()
        if not self._stopped.result():
            raise self._ended()
        return await self._hand_over(sender, sequence)

    async def _hand_over(self, sender: Sender, sequence: Sequence) -> TransferStats:
        with self._core.loop.lock:
            state = sequence_to_proto(sequence, self.ticket.sequence_id)
        try:
            async with asyncio.timeout(ADMIT_TIMEOUT_S):
                stats = await sender.finish(state)
        except TimeoutError:
            raise TransferFailed(f"{self.ticket.consumer_id} did not take over in {ADMIT_TIMEOUT_S} s") from None
        await self._all_told()
        if not self._placements.moved(self._request.sequence_id, len(state.output_token_ids)):
            raise self._ended()
        self._admitted = True
        return stats

    async def _all_told(self) -> None:
        """The tokens that were drawn here are on their way to the router before it hears that there are no more."""
        event_loop = asyncio.get_running_loop()
        told = event_loop.create_future()
        self._core.loop.after_told(lambda: event_loop.call_soon_threadsafe(told.set_result, None))
        await asyncio.shield(told)

    def _computed(self) -> tuple[int, Sequence]:
        """(Its group, the sequence), while the KV of the ticket's tokens is in its blocks."""
        with self._core.loop.lock:
            found = self._core.scheduler.find(self._request.sequence_id)
        if found is None or found[1].stage is not Stage.RUNNING or found[1].computed_tokens < self.ticket.num_tokens:
            raise TransferFailed(f"the KV of {self._request.sequence_id!r} is not in blocks here now")
        return found

    def _send(self, sender: Sender) -> None:
        """The blocks are held from here on, for the sequence may lose them, or end, at any step."""
        core, size = self._core, self._core.record.kv_layout.block_tokens
        with core.loop.lock:
            group, sequence = self._computed()
            table = tuple(sequence.block_table[: -(-self.ticket.num_tokens // size)])
            advance_in_pieces(core, sender, group, table, self.ticket)

    def _take_out(self) -> None:
        self._taking_out = True
        with self._core.loop.lock:
            is_held = self._core.scheduler.take_out(self._request.sequence_id)
        if is_held:
            self._stop(held=True)

    def _hear(self, said: Event | LegatoError) -> None:
        """What happens to the sequence meanwhile."""
        match said:
            case Tokens(finish=None, held=True):
                self._stop(held=True)
            case Tokens(finish=None) | Computed():
                return
            case Preempted():
                if self._taking_out:
                    self._take_out()
            case _:
                self._stop(held=False)

    def _stop(self, *, held: bool) -> None:
        if not self._stopped.done():
            self._stopped.set_result(held)
        elif not held and self._sender is not None:  # given up by its router while it was held
            self._sender.give_up(self._ended())

    async def _unless_ended(self, work: Awaitable[Result]) -> Result:
        """Of a sequence that has ended nothing more needs to be sent."""
        working = asyncio.ensure_future(work)
        try:
            first: set[asyncio.Future[Any]] = {working, self._stopped}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise self._ended()
            return working.result()
        finally:
            working.cancel()

    def _ended(self) -> LegatoError:
        return RequestCancelled(f"{self._request.sequence_id!r} has ended here")

    def put_back(self) -> None:
        """After run(), however it ended; a sequence that was not moved goes on."""
        self._placements.watch(self._request.sequence_id, None)
        if self._taking_out and not self._admitted:
            with self._core.loop.lock:
                self._core.scheduler.put_back(self._request.sequence_id)
            self._core.loop.wake()

    async def close(self) -> None:
        """After put_back(); must run to its end."""
        if self._sender is not None:
            has_ended = self._stopped.done() and not self._stopped.result()
            await self._sender.close(finished_without_handoff=has_ended)
        self.closed.set()


class Moves:
    """All that are under way, and those whose writes are not proven quiet yet."""

    def __init__(self, placements: Placements, peers: Peers, spans: Spans) -> None:
        self._placements = placements
        self._peers = peers
        self._spans = spans
        self._moves: dict[str, Move] = {}  # by the target's reservation
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        return len(self._moves)

    async def move(self, request: worker_pb2.MoveRequest) -> TransferStats:
        """Raises the LegatoError for which the sequence stays here."""
        core = self._placements.core
        ticket = verified_ticket(core, request.reservation)
        if not self._placements.may_move(request.sequence_id) or ticket.reservation_id in self._moves:
            raise TransferFailed(f"{request.sequence_id!r} does not run here, or is on its way already")
        move = self._moves[ticket.reservation_id] = Move(request, ticket, self._placements, self._peers)
        attributes = {names.SEQUENCE_ID: request.sequence_id, names.WORKER_ID: core.record.worker_id}
        reason = "CANCELLED"  # unless it ends otherwise
        try:
            with self._spans.span(names.SPAN_MOVE, attributes):
                stats = await move.run()
            reason = ""
            core.meter.handed_over(stats)
            return stats
        except LegatoError as error:
            reason = error.reason
            raise
        finally:
            core.meter.moved(reason)
            move.put_back()
            task = asyncio.create_task(self._close(move))  # of its own: nothing that cancels the call cancels it
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close(self, move: Move) -> None:
        await move.close()
        del self._moves[move.ticket.reservation_id]

    async def confirm_quiet(self, reservation_id: str) -> None:
        if (move := self._moves.get(reservation_id)) is not None:
            await move.closed.wait()

    async def close(self) -> None:
        """A write that is still not proven quiet goes with the process."""
        for task in self._closing:
            task.cancel()
