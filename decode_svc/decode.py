"""legato.v1.Decode: reserve, take over, write the answer.

A sequence is placed here by Reserve (its KV comes from a prefill worker, or from the decode worker that it leaves; see
worker/receiver.py) or by Admit (prefilled in the inflight batch). From then on its router reads its tokens on the
Subscribe stream, until the message that carries a finish reason or an error, or says that it moved on (move.py). A
router whose stream ends has left: its sequences are given up.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc

from decode_svc.move import Moves
from decode_svc.placements import Placed, Placements
from legato.v1 import worker_pb2, worker_pb2_grpc
from spec.errors import Draining, InvalidParameter, LegatoError, RequestCancelled, TicketRefused
from worker.clock import monotonic_s
from worker.reserving import reservation_to_proto
from worker.sequences import identity_of, sequence_from_proto


class DecodeService(worker_pb2_grpc.DecodeServicer):
    def __init__(self, placements: Placements, moves: Moves) -> None:
        self.draining = False
        self._core = placements.core
        self._placements = placements
        self._moves = moves

    async def Reserve(
        self, request: worker_pb2.ReserveRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.Reservation:
        core, state = self._core, request.sequence
        self._refuse_if_taken(state.sequence_id)
        # What no engine could take is refused before it holds blocks.
        params = sequence_from_proto(state, core.record).params
        if request.identity != identity_of(state, core.record):
            raise TicketRefused(f"{core.record.worker_id} serves another model or revision than the one asked for")
        tokens = (*state.prompt_token_ids, *state.output_token_ids)
        await core.warm(tokens, state.adapter)
        self._refuse_if_taken(state.sequence_id)  # a second call may have come meanwhile
        self._placements.subscriptions.attach(request.router_id, state.sequence_id)
        try:
            with core.loop.lock:
                reservation = core.reservations.reserve(
                    state.sequence_id,
                    tokens,
                    producer_id=request.producer_id,
                    producer_epoch=request.producer_epoch,
                    deadline_s=monotonic_s(state.deadline_unix_ns),
                    now_s=time.monotonic(),
                    adapter=state.adapter,
                )
        except LegatoError:
            self._placements.subscriptions.detach(state.sequence_id)
            raise
        self._placements.add(state.sequence_id, Placed(reservation=reservation))
        if params.constraint is not None:
            core.compile(params.constraint)  # while the prompt is computed elsewhere
        core.loop.wake()  # its lease is due one day
        return reservation_to_proto(core, reservation, tokens, state.deadline_unix_ns)

    async def Admit(
        self, request: worker_pb2.AdmitRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.AdmitResponse:
        state = request.sequence
        self._refuse_if_taken(state.sequence_id)
        sequence = sequence_from_proto(state, self._core.record)
        await self._core.prepare(sequence.params)
        if not sequence.wants_prompt_logprobs:
            await self._core.warm(sequence.tokens(0, sequence.known_tokens), sequence.adapter)
        self._refuse_if_taken(state.sequence_id)  # a second call may have come meanwhile
        self._placements.subscriptions.attach(request.router_id, state.sequence_id)
        try:
            with self._core.loop.lock:
                self._core.scheduler.add(sequence, sequence.queued_s)
        except LegatoError:
            self._placements.subscriptions.detach(state.sequence_id)
            raise
        self._placements.add(state.sequence_id, Placed())
        self._core.loop.wake()
        return worker_pb2.AdmitResponse()

    def _refuse_if_taken(self, sequence_id: str) -> None:
        if self.draining:
            raise Draining(f"{self._core.record.worker_id} is draining")
        if sequence_id in self._placements.placed:
            raise InvalidParameter(f"{sequence_id!r} runs here already", field="sequence_id")

    async def Abort(
        self, request: worker_pb2.AbortRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.AbortResponse:
        self._placements.give_up(request.sequence_id, RequestCancelled("the router gave the request up"))
        return worker_pb2.AbortResponse()

    async def Move(self, request: worker_pb2.MoveRequest, context: grpc.aio.ServicerContext) -> worker_pb2.MoveResponse:
        return worker_pb2.MoveResponse(transfer=await self._moves.move(request))

    async def Subscribe(
        self, request: worker_pb2.SubscribeRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.StepOutput]:
        subscription = self._placements.subscriptions.open(request.router_id)
        try:
            yield worker_pb2.StepOutput(load=self._core.load())
            async for output in subscription.outputs():
                yield output
        finally:
            for sequence_id in self._placements.subscriptions.close(subscription):
                self._placements.give_up(sequence_id, RequestCancelled("the router left"))
