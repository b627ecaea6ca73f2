"""legato.v1.Prefill: one call is one sequence; prefill_svc/call.py is its course.

Events of the engine loop reach a call through its queue. The loop's own thread takes a hold on the blocks of a chunk
when the step that computes it is planned, so that nothing can happen to them before they are sent, although the
sequence ends; everything else runs in the event loop.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence

import grpc

from kvtransfer.layer_groups import layer_group_ends
from legato.v1 import worker_pb2, worker_pb2_grpc
from prefill_svc.call import PrefillCall
from prefill_svc.fetch import Fetches
from scheduler.events import Computed, Event, Preempted
from scheduler.plan import StepPlan
from service.messages import layout_from_proto
from service.tracing import Spans
from spec.errors import Draining, InvalidParameter
from worker.core import Core
from worker.peers import Peers
from worker.watch import StepWatch


class PrefillService(worker_pb2_grpc.PrefillServicer):
    def __init__(self, core: Core, peers: Peers, fetches: Fetches, spans: Spans) -> None:
        self.draining = False
        self._core = core
        self._peers = peers
        self._fetches = fetches
        self._spans = spans
        self._calls: dict[str, PrefillCall] = {}  # by sequence id, until quiet and released
        self._tasks: set[asyncio.Task[None]] = set()
        self._event_loop = asyncio.get_running_loop()
        self._token_bytes = layout_from_proto(core.record.kv_layout).token_bytes

    def live(self) -> dict[str, int]:
        return {"prefill.calls": len(self._calls), "prefill.tasks": len(self._tasks)}

    def begin(self, plans: Sequence[StepPlan]) -> StepWatch | None:
        """In the engine loop's thread, before the step: chunks of open hand-overs are held, and listened to where there
        is enough of them to leave in several groups of layers."""
        core, layers = self._core, self._core.record.kv_layout.num_layers
        ends: dict[int, tuple[int, ...]] = {}
        leaving: dict[int, list[tuple[PrefillCall, int]]] = {}
        for group, plan in enumerate(plans):
            nbytes = 0
            for piece in plan.slices:
                call = self._calls.get(piece.sequence_id)
                if call is None or call.sender is None:
                    continue
                end = piece.start + len(piece.token_ids)
                blocks = call.leaving(piece.block_table, end)
                core.hold(group, blocks)
                release = functools.partial(core.unhold, group, blocks)
                self._event_loop.call_soon_threadsafe(call.sender.begin, end, group, piece.block_table, release)
                leaving.setdefault(group, []).append((call, end))
                nbytes += len(piece.token_ids) * self._token_bytes
            found = layer_group_ends(layers, nbytes, core.config.handoff.layer_group_bytes)
            if len(found) > 1:
                ends[group] = found

        def reached(group: int, layers: int) -> None:
            self._event_loop.call_soon_threadsafe(_reached, leaving[group], layers)

        return StepWatch(core.ranks, ends, reached) if ends else None

    def deliver(self, events: Sequence[Event]) -> None:
        """In a thread of the engine loop's."""
        self._event_loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Preempted):
                self._core.meter.preempted()
                continue
            call = self._calls.get(event.sequence_id)
            if call is None:
                continue
            if not isinstance(event, Computed):
                call.events.put_nowait(event)
            elif call.sender is not None:
                call.sender.computed(event.first_token + event.num_tokens)

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.PrefillEvent]:
        sequence_id = request.sequence.sequence_id
        if self.draining:
            raise Draining(f"{self._core.record.worker_id} is draining")
        if sequence_id in self._calls:
            raise InvalidParameter(f"{sequence_id!r} runs here already", field="sequence_id")
        call = self._calls[sequence_id] = PrefillCall(request, self._core, self._peers, self._fetches, self._spans)
        task = asyncio.create_task(self._run(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while (answer := await call.answers.get()) is not None:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
            await task
        finally:
            task.cancel()  # the call failed or the client left; quiet and release follow

    async def _run(self, call: PrefillCall) -> None:
        try:
            await call.run()
        finally:
            closing = asyncio.create_task(self._close(call))  # of its own: nothing that cancels the call cancels it
            self._tasks.add(closing)
            closing.add_done_callback(self._tasks.discard)
            await asyncio.shield(closing)

    async def _close(self, call: PrefillCall) -> None:
        await call.close()
        del self._calls[call.sequence_id]

    async def confirm_quiet(self, reservation_id: str) -> None:
        for call in list(self._calls.values()):
            if call.reservation_id == reservation_id:
                await call.closed.wait()


def _reached(leaving: Sequence[tuple[PrefillCall, int]], layers: int) -> None:
    for call, end in leaving:
        if call.sender is not None:
            call.sender.reached(end, layers)
