"""One worker as the router knows it: its record, its calls, what it was charged with, and whether its link stands.

    dialled ──Describe answers with the record's epoch──▶ (decode: Subscribe answers) ──▶ linked ──▶ ready
       ▲                                                                                    │
       └────────────── the stream or a call breaks: its requests learn of it at once ───────┘

A prefill worker's link is looked at once a second, more often while it has work, and by every call that fails; a decode
worker's is its Subscribe stream, which stands before anything is placed there. Another process on the same address has
another epoch: it is not this worker.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from router.policy import DecodeView, Move, PrefillView
from service import logs
from service.channel import Channel
from service.status import error_from_reason, error_from_rpc
from spec.errors import LegatoError, RequestCancelled, WorkerLost

logger = logs.get(__name__)

PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 5.0
BUSY_PROBE_EVERY_S = 0.25  # while it has work waiting, of other routers perhaps: how much is left decides who gets more
REDIAL_S = (0.05, 0.1, 0.25, 0.5, 1.0)  # from the beginning again after a link that lasted as long as the longest
RATE_WINDOW_S = 5.0
MOVES_AT_ONCE = 4  # sequences that leave a decode worker share its link

Deliver = Callable[[worker_pb2.SequenceOutput | LegatoError], None]


class Charge:
    """Tokens of work or of KV that a sequence puts on a worker, from dispatch until it is seen finished."""

    def __init__(self, worker: Worker, sequence_id: str, tokens: int) -> None:
        self.sequence_id = sequence_id
        self.draws = False  # the worker has drawn a token since this was last set to False
        self._worker = worker
        self._tokens = 0
        self._open = True
        worker.charges.add(self)
        self.add(tokens)

    @property
    def tokens(self) -> int:
        return self._tokens

    def add(self, tokens: int) -> None:
        if self._open:
            self._tokens += tokens
            self._worker.charged_tokens += tokens

    def release(self) -> None:
        """Idempotent."""
        if self._open:
            self._worker.released_tokens += self._tokens
            self.add(-self._tokens)
            self._open = False
            self._worker.charges.discard(self)
            self._worker.changed()


class Worker:
    """`changed` is called when room may have come or gone, `moved` when the worker became ready or stopped being so."""

    def __init__(
        self,
        record: worker_pb2.WorkerRecord,
        channel: Channel,
        router_id: str,
        changed: Callable[[], None],
        moved: Callable[[], None],
    ) -> None:
        self.record = record
        self.channel = channel
        self.control = worker_pb2_grpc.WorkerStub(channel)
        self.prefill = worker_pb2_grpc.PrefillStub(channel)
        self.decode = worker_pb2_grpc.DecodeStub(channel)
        self.leased = True  # its registration stands in Redis
        self.linked = False
        self.retired = False
        self.charged_tokens = 0
        self.released_tokens = 0  # of all charges that have ended
        self.charges: set[Charge] = set()
        self.load = worker_pb2.WorkerLoad(free_blocks=record.total_blocks)
        self._released_at_load = 0  # `released_tokens` when its load was last asked for
        self._router_id = router_id
        self.changed = changed
        self._moved = moved
        self.moves = asyncio.Semaphore(MOVES_AT_ONCE)  # off this decode worker
        self.moving = 0  # sequences that are on their way off it
        self.asked: Move | None = None  # of one sequence of ours that runs here
        self._routes: dict[str, Deliver] = {}
        self._broken = asyncio.Event()
        self._rates: collections.deque[tuple[float, int]] = collections.deque()
        self._task = asyncio.get_running_loop().create_task(self._keep_linked(), name=f"link {record.worker_id}")

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    def worker_id(self) -> str:
        return self.record.worker_id

    @property
    def is_prefill(self) -> bool:
        return self.record.role == worker_pb2.PREFILL

    @property
    def ready(self) -> bool:
        return self.linked and not self.record.draining and not self.retired

    @property
    def state(self) -> str:
        """As `legato top` shows it."""
        if not self.linked:
            return "lost"
        return "draining" if self.record.draining else "ready"

    def sends_away(self, sequence_id: str) -> bool:
        """Whether a sequence that runs here should go on elsewhere."""
        return self.record.draining or (self.asked is not None and self.asked.sequence_id == sequence_id)

    @property
    def longest_tokens(self) -> int:
        """The longest sequence that it takes."""
        return min(self.record.max_context_tokens, self.kv_tokens)

    @property
    def kv_tokens(self) -> int:
        return self.record.total_blocks * self.record.kv_layout.block_tokens

    def prefill_view(self) -> PrefillView:
        ended_since = self.released_tokens - self._released_at_load  # an idle worker is not busy until its next word
        reported_tokens = max(0, self.load.waiting_tokens - ended_since)
        step_tokens = self.record.max_step_tokens
        return PrefillView(self.worker_id, self.charged_tokens, reported_tokens, step_tokens, self.longest_tokens)

    def decode_view(self) -> DecodeView:
        used_blocks = self.record.total_blocks - self.load.free_blocks
        reported_tokens = used_blocks * self.record.kv_layout.block_tokens
        return DecodeView(self.worker_id, self.charged_tokens, reported_tokens, self.kv_tokens, self.longest_tokens)

    def tokens_per_s(self) -> float:
        """Computed and generated, over the last seconds."""
        now_s = time.monotonic()
        while len(self._rates) > 2 and self._rates[1][0] < now_s - RATE_WINDOW_S:
            self._rates.popleft()
        if len(self._rates) < 2 or self._rates[-1][0] < now_s - RATE_WINDOW_S:
            return 0.0
        (start_s, start), (_, end) = self._rates[0], self._rates[-1]
        return (end - start) / max(now_s - start_s, 1e-3)

    # -- sequences that run here ----------------------------------------------------------------------------------

    @property
    def requests(self) -> int:
        return len(self.charges)

    def charge(self, sequence_id: str, tokens: int) -> Charge:
        return Charge(self, sequence_id, tokens)

    def open_route(self, sequence_id: str, deliver: Deliver) -> None:
        """From here on `deliver` gets the sequence's outputs, and the error when this worker is lost."""
        assert sequence_id not in self._routes
        self._routes[sequence_id] = deliver

    def close_route(self, sequence_id: str) -> None:
        """What still comes for it is late, and falls on the floor. Idempotent."""
        self._routes.pop(sequence_id, None)

    @property
    def routes(self) -> int:
        return len(self._routes)

    def call_failed(self, rpc_error: grpc.RpcError) -> LegatoError:
        """What a call to this worker ended with, as our error. A link that broke is noted for everyone."""
        error = error_from_rpc(rpc_error)
        if isinstance(error, RequestCancelled):  # we did not cancel it: its server is going away
            error = WorkerLost(f"{self.worker_id} gave the call up", worker_id=self.worker_id)
        elif isinstance(error, WorkerLost):
            error = WorkerLost(f"{self.worker_id} is lost: {error.message}", worker_id=self.worker_id)
            self.lost(error)
        return error

    def lost(self, error: LegatoError) -> None:
        """The link broke: every sequence here learns of it now. It is dialled again unless it was retired."""
        was_linked, self.linked = self.linked, False
        self._broken.set()
        routes, self._routes = self._routes, {}
        for deliver in routes.values():
            deliver(error)
        if was_linked:
            if not self.retired:
                logger.warning("%s", error.message)
            self._moved()

    async def retire(self, error: LegatoError) -> None:
        """It is gone for good: fails what runs here and ends the link. Idempotent."""
        self.retired = True
        self.lost(error)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await self.channel.close()

    # -- the link -------------------------------------------------------------------------------------------------

    async def _keep_linked(self) -> None:
        failures = 0
        clock = asyncio.get_running_loop()
        while not self.retired:
            self._broken.clear()
            begun_s = clock.time()
            try:
                await self._check_epoch()
                await (self._look_after() if self.is_prefill else self._follow_steps())
                error: LegatoError = WorkerLost(f"{self.worker_id} ended the link", worker_id=self.worker_id)
            except grpc.RpcError as rpc_error:
                found = error_from_rpc(rpc_error)
                error = WorkerLost(f"{self.worker_id} is lost: {found.message}", worker_id=self.worker_id)
            except WorkerLost as other_process:
                error = other_process
            if clock.time() - begun_s >= REDIAL_S[-1]:
                failures = 0
            self.lost(error)
            await asyncio.sleep(REDIAL_S[min(failures, len(REDIAL_S) - 1)])
            failures += 1

    async def _check_epoch(self) -> None:
        found = await self.control.Describe(worker_pb2.DescribeRequest(), timeout=PROBE_TIMEOUT_S)
        if (found.worker_id, found.epoch) != (self.record.worker_id, self.record.epoch):
            raise WorkerLost(f"another process answers on {self.worker_id}'s address", worker_id=self.worker_id)

    def _link_stands(self) -> None:
        if not self.linked:
            logger.info("%s at %s is linked", self.worker_id, self.record.address)
            self.linked = True
            self._moved()

    async def _look_after(self) -> None:
        """Returns when a call found the link broken; raises grpc.RpcError when the probe did."""
        await self.refresh()
        self._link_stands()
        while not self._broken.is_set():
            try:
                async with asyncio.timeout(BUSY_PROBE_EVERY_S if self.load.waiting_tokens else PROBE_EVERY_S):
                    await self._broken.wait()
            except TimeoutError:
                await self.refresh()

    async def refresh(self) -> None:
        """Asks for its load now. Raises grpc.RpcError."""
        released_tokens = self.released_tokens
        counts = await self.control.GetCounts(worker_pb2.GetCountsRequest(), timeout=PROBE_TIMEOUT_S)
        self._released_at_load = released_tokens
        self._note_load(counts.load)

    async def _follow_steps(self) -> None:
        """Returns when the worker ends the stream; raises grpc.RpcError when it breaks."""
        steps = self.decode.Subscribe(worker_pb2.SubscribeRequest(router_id=self._router_id))
        try:
            async for step in steps:
                self._link_stands()
                for output in step.sequences:
                    deliver = self._routes.get(output.sequence_id)
                    if deliver is not None:
                        deliver(_error_in(output) or output)
                if step.HasField("load"):
                    self._note_load(step.load)
        finally:
            steps.cancel()

    def _note_load(self, load: worker_pb2.WorkerLoad) -> None:
        more_room = load.free_blocks > self.load.free_blocks or load.waiting_tokens < self.load.waiting_tokens
        self.load = load
        now_s = time.monotonic()
        if not self._rates or now_s - self._rates[-1][0] > 0.2:
            self._rates.append((now_s, load.computed_tokens + load.generated_tokens))
        if more_room:
            self.changed()


def _error_in(output: worker_pb2.SequenceOutput) -> LegatoError | None:
    return error_from_reason(output.error, output.error_message) if output.error else None
