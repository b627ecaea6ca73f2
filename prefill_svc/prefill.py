"""legato.v1.Prefill: one call is one sequence; prefill_svc/call.py is its course.

Events of the engine loop reach a call through its queue. The loop's own thread takes a hold on the blocks of a chunk,
so that nothing can happen to them before they are sent; everything else runs in the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from prefill_svc.call import PrefillCall
from scheduler.events import Computed, Event, Preempted
from service.tracing import Spans
from spec.errors import Draining, InvalidParameter
from worker.core import Core
from worker.peers import Peers


class PrefillService(worker_pb2_grpc.PrefillServicer):
    def __init__(self, core: Core, peers: Peers, spans: Spans) -> None:
        self.draining = False
        self._core = core
        self._peers = peers
        self._spans = spans
        self._calls: dict[str, PrefillCall] = {}  # by sequence id, until quiet and released
        self._tasks: set[asyncio.Task[None]] = set()
        self._event_loop = asyncio.get_running_loop()

    def live(self) -> dict[str, int]:
        return {"prefill.calls": len(self._calls), "prefill.tasks": len(self._tasks)}

    def deliver(self, events: Sequence[Event]) -> None:
        """In the engine loop's thread."""
        for event in events:
            if isinstance(event, Computed):
                self._core.hold(event.group, event.block_table)
        self._event_loop.call_soon_threadsafe(self._dispatch, events)

    def _dispatch(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Preempted):
                self._core.meter.preempted()
                continue
            if (call := self._calls.get(event.sequence_id)) is not None:
                call.events.put_nowait(event)
            elif isinstance(event, Computed):
                self._core.unhold(event.group, event.block_table)

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.PrefillEvent]:
        sequence_id = request.sequence.sequence_id
        if self.draining:
            raise Draining(f"{self._core.record.worker_id} is draining")
        if sequence_id in self._calls:
            raise InvalidParameter(f"{sequence_id!r} runs here already", field="sequence_id")
        call = self._calls[sequence_id] = PrefillCall(request, self._core, self._peers, self._spans)
        task = asyncio.create_task(self._run(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            while (answer := await call.answers.get()) is not None:
                yield answer
            await task
        finally:
            task.cancel()  # the client left; quiet and release follow

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
