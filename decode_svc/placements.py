"""Which sequences are on this worker, where their tokens go, and how they are given up.

    placed by Reserve or Admit ──▶ tokens to the router's subscription ──▶ last message (finish reason or error)
                               └─▶ give_up: router, lease, writer or digest said no; memory follows when it is quiet

Used in the event loop only; `deliver` and `tick` are called in threads of the engine loop's and post over.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence

from opentelemetry.context import Context, get_current

from decode_svc.subscriptions import Subscription, Subscriptions
from kvtransfer import ticket as tickets
from legato.v1 import worker_pb2
from scheduler.events import Event, Failed, Preempted, Tokens
from scheduler.handoff import Reservation
from service.messages import finish_to_proto, logprobs_to_proto, token_to_proto
from service.status import reason_to_proto
from service.tracing import Spans
from spec.errors import LegatoError, RequestCancelled, TicketRefused, TransferFailed
from telemetry import names
from worker.clock import unix_ns
from worker.core import Core
from worker.receiver import Claim
from worker.sequences import sequence_from_proto

MAX_OUTPUT_BYTES = 1 << 20  # of a step's message, before the next one is begun; gRPC takes no message of any size
HEARTBEAT_S = 0.5  # routers learn of freed blocks and of our life at least this often


@dataclasses.dataclass(slots=True)
class Placed:
    """A sequence between Reserve or Admit and its last message."""

    reservation: Reservation | None = None
    handed_over_ns: int = 0
    cancel_writer: Callable[[LegatoError], None] | None = None  # set while a Handoff stream is open
    watch: Callable[[Event | LegatoError], None] | None = None  # set while it is on its way to another decode worker
    told: bool = False  # stage times went out
    output_tokens: int = 0
    context: Context = dataclasses.field(default_factory=get_current)  # the trace that it belongs to
    stages: tuple[int, int, int] = (0, 0, 0)  # its queue began, its first step began and ended; unix nanoseconds


class Placements:
    """Owned by the process."""

    def __init__(self, core: Core, spans: Spans) -> None:
        self.core = core
        self._spans = spans
        self.placed: dict[str, Placed] = {}
        self.subscriptions = Subscriptions()
        self._event_loop = asyncio.get_running_loop()

    def add(self, sequence_id: str, placed: Placed) -> None:
        self.placed[sequence_id] = placed

    def give_up(self, sequence_id: str, reason: LegatoError) -> None:
        """Request failed; its memory follows when it is quiet. Unknown ids are fine: it may have just ended."""
        placed = self.placed.pop(sequence_id, None)
        subscription = self.subscriptions.of(sequence_id)
        self.subscriptions.detach(sequence_id)
        if placed is None:
            return
        if subscription is not None and not isinstance(reason, RequestCancelled):  # who cancelled knows it
            subscription.put(worker_pb2.StepOutput(sequences=[_failure(sequence_id, reason)], load=self.core.load()))
        self._trace(sequence_id, placed)
        now_s = time.monotonic()
        with self.core.loop.lock:
            self.core.scheduler.abort(sequence_id, now_s)
            if placed.reservation is not None:
                self.core.reservations.fail(placed.reservation.reservation_id, reason.reason, now_s)
        if placed.cancel_writer is not None:
            placed.cancel_writer(reason)
        if placed.watch is not None:
            placed.watch(reason)
        self.core.loop.wake()

    # ---- as worker/receiver.py's Claims ----

    def claim(self, sequence_id: str) -> Placed | None:
        return self.placed.get(sequence_id)

    async def admit(
        self, ticket: worker_pb2.Ticket, final: worker_pb2.HandoffRequest.Final, claimed: Callable[[], Claim]
    ) -> None:
        """The sequence joins the batch."""
        core, state = self.core, final.sequence
        tokens = (*state.prompt_token_ids, *state.output_token_ids)
        if (
            state.sequence_id != ticket.sequence_id
            or state.adapter != ticket.identity.adapter
            or len(tokens) <= ticket.num_tokens
            or tickets.prefix_digest(ticket.identity, tokens[: ticket.num_tokens]) != ticket.prefix_digest
        ):
            raise TicketRefused(
                "the sequence state is not of the tokens, or the adapter, that the ticket was issued for"
            )
        sequence = sequence_from_proto(state, core.record)
        await core.prepare(sequence.params)
        claimed()  # it may have been given up meanwhile
        placed = self.placed[ticket.sequence_id]
        with core.loop.lock:
            now_s = time.monotonic()
            assert placed.reservation is not None
            group = placed.reservation.group
            block_table = core.reservations.complete(ticket.reservation_id, now_s)
            core.scheduler.adopt(sequence, block_table, ticket.num_tokens, now_s, group=group)
        placed.handed_over_ns = unix_ns(now_s)
        placed.reservation = None
        placed.cancel_writer = None

    # ---- moves to another decode worker ----

    def may_move(self, sequence_id: str) -> bool:
        placed = self.placed.get(sequence_id)
        return placed is not None and placed.reservation is None and placed.watch is None

    def watch(self, sequence_id: str, watch: Callable[[Event | LegatoError], None] | None) -> None:
        """From here on `watch` is called with what happens to the sequence, after its router was told, and with why it
        is given up. None: no more."""
        if (placed := self.placed.get(sequence_id)) is not None:
            placed.watch = watch

    def moved(self, sequence_id: str, output_tokens: int) -> bool:
        """A held sequence goes on elsewhere with the next token of the answer: its last message here says so. False: it
        was given up meanwhile."""
        placed = self.placed.pop(sequence_id, None)
        if placed is None:
            return False
        if (subscription := self.subscriptions.of(sequence_id)) is not None:
            last = worker_pb2.SequenceOutput(sequence_id=sequence_id, first_index=output_tokens, moved=True)
            subscription.put(worker_pb2.StepOutput(sequences=[last], load=self.core.load()))
        self.subscriptions.detach(sequence_id)
        self._trace(sequence_id, placed)
        with self.core.loop.lock:
            self.core.scheduler.release(sequence_id)
        self.core.loop.wake()  # somebody may wait for these blocks
        return True

    # ---- tokens ----

    def deliver(self, events: Sequence[Event]) -> None:
        """In a thread of the engine loop's."""
        self._event_loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Sequence[Event]) -> None:
        outputs: dict[Subscription, worker_pb2.StepOutput] = {}
        watched: list[tuple[Callable[[Event | LegatoError], None], Event]] = []
        for event in events:
            placed = self.placed.get(event.sequence_id)
            if isinstance(event, Preempted):
                self.core.meter.preempted()
            if placed is not None and placed.watch is not None:
                watched.append((placed.watch, event))
            subscription = self.subscriptions.of(event.sequence_id)
            if subscription is None or placed is None or not isinstance(event, Tokens | Failed):
                continue
            output = outputs.setdefault(subscription, worker_pb2.StepOutput())
            last = self._fill(output.sequences.add(), event, placed)
            if last:
                del self.placed[event.sequence_id]
                self.subscriptions.detach(event.sequence_id)
                self._trace(event.sequence_id, placed)
            if _is_long(event) and output.ByteSize() > MAX_OUTPUT_BYTES:
                self._send(subscription, outputs.pop(subscription))
        for subscription, output in outputs.items():
            self._send(subscription, output)
        for watch, event in watched:
            watch(event)

    def _send(self, subscription: Subscription, output: worker_pb2.StepOutput) -> None:
        output.load.CopyFrom(self.core.load())
        subscription.put(output)

    def _fill(self, output: worker_pb2.SequenceOutput, event: Tokens | Failed, placed: Placed) -> bool:
        """Returns whether this is the sequence's last message."""
        if isinstance(event, Failed):
            output.CopyFrom(_failure(event.sequence_id, event.error))
            return True
        output.sequence_id = event.sequence_id
        output.first_index = event.first_index
        output.tokens.extend(token_to_proto(drawn.token_id, drawn.logprobs) for drawn in event.drawn)
        output.finish_reason = finish_to_proto(event.finish)
        output.proposed_tokens, output.accepted_tokens = event.proposed_tokens, event.accepted_tokens
        placed.output_tokens = event.first_index + len(event.drawn)
        if not placed.told:
            placed.told = True
            placed.stages = unix_ns(event.queued_s), unix_ns(event.started_s), unix_ns(event.drawn_s)
            output.queued_ns, output.started_ns, output.drawn_ns = placed.stages
            output.handed_over_ns = placed.handed_over_ns
            output.cached_tokens = event.cached_tokens
            output.prompt_logprobs.extend(logprobs_to_proto(entry) for entry in event.prompt_logprobs)
        return event.finish is not None

    def _trace(self, sequence_id: str, placed: Placed) -> None:
        queued_ns, started_ns, drawn_ns = placed.stages
        attributes: dict[str, str | int] = {
            names.SEQUENCE_ID: sequence_id,
            names.WORKER_ID: self.core.record.worker_id,
            names.OUTPUT_TOKENS: placed.output_tokens,
        }
        whole = self._spans.record(names.SPAN_DECODE, queued_ns, time.time_ns(), attributes, placed.context)
        self._spans.record(names.SPAN_DECODE_QUEUE, queued_ns, started_ns, context=whole)
        self._spans.record(names.SPAN_DECODE_FIRST_STEP, started_ns, drawn_ns, context=whole)

    async def heartbeat(self) -> None:
        """Tells every router our load, also when nothing runs: blocks may have become free without a token drawn."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            load = self.core.load()
            for subscription in self.subscriptions.all:
                subscription.put(worker_pb2.StepOutput(load=load))

    # ---- leases ----

    def tick(self, now_s: float) -> float | None:
        """In the engine loop's thread, its lock held: ends what outlived its lease; says when the next lease is due."""
        expired = self.core.reservations.expire(now_s)
        if expired:
            self._event_loop.call_soon_threadsafe(self._lease_ended, expired)
        return self.core.reservations.next_expiry_s()

    def _lease_ended(self, reservation_ids: Sequence[str]) -> None:
        for sequence_id, placed in list(self.placed.items()):
            if placed.reservation is not None and placed.reservation.reservation_id in reservation_ids:
                self.give_up(
                    sequence_id, TransferFailed("no sign of the writer within the lease", sequence=sequence_id)
                )


def _is_long(event: Tokens | Failed) -> bool:
    """Log-probabilities make a message grow: up to the whole vocabulary for a token, or for each of the prompt's."""
    return isinstance(event, Tokens) and (bool(event.prompt_logprobs) or event.drawn[0].logprobs is not None)


def _failure(sequence_id: str, error: LegatoError) -> worker_pb2.SequenceOutput:
    return worker_pb2.SequenceOutput(sequence_id=sequence_id, error=reason_to_proto(error), error_message=error.message)
