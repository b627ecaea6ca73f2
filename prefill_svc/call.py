"""The course of one Prefill call.

run ── check the ticket, open the hand-over (sender.open)
    ── bring back or fetch what others hold of the prefix
    ── add to the scheduler ──▶ steps are planned, executed, committed: chunks leave (sender.begin, reached, computed)
    │                          Tokens: the first token is answered at once, the sequence goes
    │                          Failed, or the hand-over failed: the call ends typed, the sequence goes
    │                          chunks on their way hold their blocks by themselves
    ── finish the hand-over (sender.finish) ──▶ HandedOver
    ── whatever happened: it is answered; then nothing is in flight (sender.close)
"""

from __future__ import annotations

import asyncio
import time

from legato.v1 import worker_pb2
from prefill_svc.fetch import Fetches
from scheduler.events import Event, Failed, Tokens
from service.messages import finish_to_proto, logprobs_to_proto, token_to_proto
from service.tracing import Spans
from spec.errors import LegatoError
from telemetry import names
from worker.clock import unix_ns
from worker.core import Core
from worker.outgoing import ACCEPT_TIMEOUT_S, sender_for, verified_ticket
from worker.peers import Peers
from worker.sender import Sender
from worker.sequences import identity_of, sequence_from_proto


class PrefillCall:
    """`events` come from the engine loop, `answers` go to the router; the failure that ended the call ends them, or
    None."""

    def __init__(
        self, request: worker_pb2.PrefillRequest, core: Core, peers: Peers, fetches: Fetches, spans: Spans
    ) -> None:
        self.sequence_id: str = request.sequence.sequence_id
        self.reservation_id = ""
        self.events: asyncio.Queue[Event | LegatoError] = asyncio.Queue()
        self.answers: asyncio.Queue[worker_pb2.PrefillEvent | Exception | None] = asyncio.Queue()
        self.closed = asyncio.Event()
        self._request = request
        self._core = core
        self._peers = peers
        self._fetches = fetches
        self._spans = spans
        self._ticket: worker_pb2.Ticket | None = None
        self._taken_tokens = 0  # positions before are not needed here, or in chunks that have begun
        self.sender: Sender | None = None  # set before the sequence is the scheduler's
        self._drawn = False  # the sequence has ended here
        self._ended_here = False  # with its first token: nothing is handed over

    async def run(self) -> None:
        """Before close(): to the decode worker a failure here is no more than a writer that stopped."""
        attributes = {names.SEQUENCE_ID: self.sequence_id, names.WORKER_ID: self._core.record.worker_id}
        try:
            with self._spans.span(names.SPAN_PREFILL, attributes):
                if self._request.HasField("reservation"):
                    await self._open_handoff()
                first = await self._first_token()
                self._ended_here = bool(first.finish_reason)
                self.answers.put_nowait(worker_pb2.PrefillEvent(first_token=first))
                if self.sender is not None and not self._ended_here:
                    await self._finish_handoff(self.sender, first)
        except Exception as failure:
            self.answers.put_nowait(failure)
        else:
            self.answers.put_nowait(None)

    async def _open_handoff(self) -> None:
        """Only for exactly this sequence, this model and this process: raises TicketRefused otherwise."""
        core, reservation, state = self._core, self._request.reservation, self._request.sequence
        identity = identity_of(state, core.record)
        ticket = self._ticket = verified_ticket(core, reservation)
        self.reservation_id = ticket.reservation_id
        self._taken_tokens = ticket.first_token
        tokens = (*state.prompt_token_ids, *state.output_token_ids)
        self.sender = await sender_for(
            core, self._peers, ticket, reservation, self._request.decode_address, identity, tokens
        )
        self.sender.failed.add_done_callback(lambda failed: self.events.put_nowait(failed.result()))
        await self.sender.open(ACCEPT_TIMEOUT_S)

    async def _first_token(self) -> worker_pb2.PrefillEvent.FirstToken:
        sequence = sequence_from_proto(self._request.sequence, self._core.record, draws_here=1)
        await self._core.prepare(sequence.params)
        if not sequence.wants_prompt_logprobs:
            await self._core.warm(sequence.tokens(0, sequence.known_tokens), sequence.adapter)
            reservation, address = self._request.reservation, self._request.decode_address
            sends = not any(rank.host for rank in reservation.ranks)  # of several hosts it cannot
            if self._ticket is not None and sends:
                await self._fetches.fetch(sequence, self._ticket, reservation.kv_layout, address)
        with self._core.loop.lock:
            self._core.scheduler.add(sequence, time.monotonic())
        self._core.loop.wake()
        while not isinstance(event := await self.events.get(), Tokens):
            match event:
                case Failed():
                    raise event.error
                case LegatoError():
                    raise event
        self._drawn = True
        with self._core.loop.lock:
            self._core.scheduler.release(self.sequence_id)
        self._core.loop.wake()  # somebody may wait for these blocks
        self._spans.record(names.SPAN_PREFILL_QUEUE, unix_ns(event.queued_s), unix_ns(event.started_s))
        self._spans.record(
            names.SPAN_PREFILL_COMPUTE,
            unix_ns(event.started_s),
            unix_ns(event.drawn_s),
            {names.CACHED_TOKENS: event.cached_tokens},
        )
        return worker_pb2.PrefillEvent.FirstToken(
            token=token_to_proto(event.drawn[0].token_id, event.drawn[0].logprobs),
            finish_reason=finish_to_proto(event.finish),
            prompt_logprobs=[logprobs_to_proto(entry) for entry in event.prompt_logprobs],
            queued_ns=unix_ns(event.queued_s),
            started_ns=unix_ns(event.started_s),
            drawn_ns=unix_ns(event.drawn_s),
            cached_tokens=event.cached_tokens,
        )

    async def _finish_handoff(self, sender: Sender, first: worker_pb2.PrefillEvent.FirstToken) -> None:
        state = worker_pb2.SequenceState()
        state.CopyFrom(self._request.sequence)
        state.output_token_ids.append(first.token.token_id)
        stats = await sender.finish(state)
        self._core.meter.handed_over(stats)
        if self._ticket is not None:
            self._fetches.note(self._ticket.consumer_id, stats)
        now_ns = time.time_ns()
        began_ns = sender.first_write_ns or first.drawn_ns
        transfer = self._spans.record(names.SPAN_TRANSFER, began_ns, now_ns, {names.TRANSFER_BYTES: stats.bytes})
        self._spans.record(names.SPAN_HANDOFF_FINISH, first.drawn_ns, now_ns, context=transfer)
        self.answers.put_nowait(worker_pb2.PrefillEvent(handed_over=worker_pb2.PrefillEvent.HandedOver(transfer=stats)))

    def leaving(self, block_table: tuple[int, ...], end: int) -> tuple[int, ...]:
        """The blocks of a step's chunk that ends at token `end`: from what no chunk before has taken; a block is taken
        once it is full. In the engine loop's thread, in the order of the steps."""
        assert self._ticket is not None
        first, size = self._taken_tokens, self._core.record.kv_layout.block_tokens
        self._taken_tokens = max(first, end if end >= self._ticket.num_tokens else end - end % size)
        return block_table[first // size : -(-end // size)]

    async def close(self) -> None:
        """After run(), however it ended; must run to its end."""
        core = self._core
        if not self._drawn:
            with core.loop.lock:
                core.scheduler.abort(self.sequence_id, time.monotonic())
            core.loop.wake()
        if self.sender is not None:
            await self.sender.close(finished_without_handoff=self._ended_here)
        self.closed.set()
