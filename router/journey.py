"""One answer, from its place in the line to its last token, whatever happens to the workers.

    place ──▶ reserved (decode) ──▶ Prefill ──▶ first token ──▶ handed over ──▶ tokens from the subscription ──▶ end
      ▲                                                                                            │
      └── a worker or a hand-over was lost: prompt + tokens so far are placed again, at most 3 times ┘
                                         its decode worker drains, or is short of blocks: it moves (moves.py)

Exactly once, by construction: a token is accepted at index len(output) and nowhere else; what comes twice is dropped,
what comes too early waits. The draw is a function of (seed, position), so the tokens behind a failover are those that
would have come without it.

Whoever leaves the iterator, for whatever reason, leaves nothing behind: the Prefill call is cancelled, the decode
worker is told, charges are released, without waiting for either.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Iterable

import grpc

from legato.v1 import common_pb2, worker_pb2
from router.ledger import Ledger
from router.moves import move_away
from router.placement import Failure, Need, Placement
from router.placer import Placer
from router.registry import Model
from router.worker import Worker
from service import logs
from service.tracing import Spans
from spec.errors import (
    DeadlineExceeded,
    Draining,
    HandoffError,
    LegatoError,
    OutOfBlocks,
    Overloaded,
    RequestCancelled,
    TransferFailed,
    WorkerLost,
)
from telemetry import names

logger = logs.get(__name__)

MAX_ATTEMPTS = 3
LAST_WORD_S = 0.25  # a Prefill call that has nothing more to do says so within this
QUIET_END_S = 2.0
# What other workers, or the same ones a moment later, may do better.
PLACE_AGAIN = (WorkerLost, HandoffError, Draining, OutOfBlocks, Overloaded)


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens `first_index`.. of the answer. `finish_reason` is set with the last ones."""

    first_index: int
    tokens: tuple[common_pb2.Token, ...]
    finish_reason: common_pb2.FinishReason = common_pb2.FINISH_REASON_UNSPECIFIED
    prompt_logprobs: tuple[common_pb2.TokenLogprobs, ...] = ()
    proposed_tokens: int = 0  # guesses that were verified to draw these
    accepted_tokens: int = 0


class Deadline:
    """On the event loop's clock; `unix_ns` is the same moment for workers."""

    def __init__(self, in_s: float) -> None:
        self.at_s = asyncio.get_running_loop().time() + in_s
        self.unix_ns = time.time_ns() + int(in_s * 1e9)

    def remaining_s(self) -> float:
        return max(0.0, self.at_s - asyncio.get_running_loop().time())


class Journey:
    """One choice of one request. `resume`: tokens of it that the client has. `follows`: other choices run already."""

    def __init__(
        self,
        placer: Placer,
        model: Model,
        name: str,
        prompt_token_ids: list[int],
        sampling: common_pb2.SamplingParams,
        resume: list[int],
        arrival: int,
        deadline: Deadline,
        ledger: Ledger,
        spans: Spans,
        follows: bool = False,
    ) -> None:
        state = worker_pb2.SequenceState(
            prompt_token_ids=prompt_token_ids,
            output_token_ids=resume,
            sampling=sampling,
            deadline_unix_ns=deadline.unix_ns,
            adapter=model.identity.adapter,
        )
        if resume:
            state.sampling.ClearField("prompt_logprobs")  # they went out with the first piece
        self.ledger = ledger
        self._need = Need(model, state, arrival, was_placed=follows)
        self._output = state.output_token_ids
        self._placer = placer
        self._name = name
        self._deadline = deadline
        self._spans = spans
        self._placements = 0
        self._early: dict[int, worker_pb2.SequenceOutput] = {}
        self._prefill_call: asyncio.Task[bool] | None = None
        self._moving: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._failed: Worker | None = None  # who ended the placement, as far as it is known

    async def run(self) -> AsyncGenerator[Drawn, None]:
        """Raises the typed error that ended it. Use with contextlib.aclosing."""
        while True:
            placement = await self._place()
            ended = False
            try:
                self._set_off(placement)
                while not ended:
                    drawn = await self._next(placement)
                    ended = bool(drawn.finish_reason)
                    if ended:
                        await self._last_word(placement)
                    yield drawn
                return
            except PLACE_AGAIN as error:
                self._lost(placement, error)
            finally:
                self._leave(placement, ended)

    # -- one placement ------------------------------------------------------------------------------------------------

    async def _place(self) -> Placement:
        """Its span is not the current one: what workers are asked for belongs to the request, and outlives this."""
        now_ns = time.time_ns()
        self.ledger.stood(now_ns)
        attempt = self.ledger.route.attempts + 1
        begun_ns = self.ledger.times.sent_ns if attempt == 1 and not self._need.was_placed else now_ns
        attributes: dict[str, str | int] = {names.ATTEMPT: attempt}
        try:
            async with asyncio.timeout_at(self._deadline.at_s):
                return await self._placer.place(self._need, self._next_name)
        except TimeoutError:
            attributes[names.ERROR_REASON] = DeadlineExceeded.reason
            raise DeadlineExceeded("the deadline passed while the request waited for workers with room") from None
        except LegatoError as error:
            attributes[names.ERROR_REASON] = error.reason
            raise
        finally:
            self._spans.record(names.SPAN_ROUTE, begun_ns, time.time_ns(), attributes)

    def _next_name(self) -> str:
        self._placements += 1
        return f"{self._name}.{self._placements}"

    def _set_off(self, placement: Placement) -> None:
        loop = asyncio.get_running_loop()
        self._early.clear()
        self._alarm = loop.call_at(self._deadline.at_s, self._too_late, placement)
        route = self.ledger.route
        route.attempts += 1
        route.prefill_worker_id = placement.prefill.worker_id if placement.prefill is not None else ""
        route.decode_worker_id = placement.decode.worker_id if placement.decode is not None else ""
        route.ClearField("transfer")
        self._prefill_call = self._failed = None
        if placement.prefill is not None:
            reading = self._read_prefill(placement, placement.prefill)
            self._prefill_call = loop.create_task(reading, name=f"prefill {placement.sequence_id}")

    def _too_late(self, placement: Placement) -> None:
        error = DeadlineExceeded(f"the deadline passed after {len(self._output)} tokens of the answer")
        placement.events.put_nowait(Failure(error, None))

    async def _read_prefill(self, placement: Placement, prefill: Worker) -> bool:
        """All that the Prefill call says goes into the placement's line; its end too, unless it ended well (True)."""
        decode = placement.decode
        request = worker_pb2.PrefillRequest(sequence=placement.sequence, reservation=placement.reservation)
        if decode is not None:
            request.decode_address = decode.record.address
        call = prefill.prefill.Prefill(request, timeout=self._deadline.remaining_s() + QUIET_END_S)
        complete = False
        try:
            async for event in call:
                complete = event.HasField("handed_over") or bool(event.first_token.finish_reason)
                placement.events.put_nowait(event)
            if not complete:
                error: LegatoError = TransferFailed(f"{prefill.worker_id} ended the call before the hand-over")
                placement.events.put_nowait(Failure(error, prefill))
        except grpc.aio.AioRpcError as rpc_error:
            complete = False
            placement.events.put_nowait(Failure(prefill.call_failed(rpc_error), prefill))
        finally:
            call.cancel()
        return complete

    async def _next(self, placement: Placement) -> Drawn:
        """The next tokens; raises the error that ended the placement."""
        while True:
            early = self._early.pop(len(self._output), None)
            event = early if early is not None else await placement.events.get()
            drawn = None
            match event:
                case Failure(_, worker) if worker is not None and worker not in placement.workers():
                    if placement.target is not None and worker is placement.target.decode:
                        self._placer.drop_target(placement)
                case Failure(error, worker):
                    if worker is not placement.prefill or worker is None or not placement.handed_over:
                        cause = await self._cause(Failure(error, worker), placement)
                        self._failed = cause.worker
                        raise self._as_ours(cause.error)
                case worker_pb2.SequenceOutput() if event.sequence_id != placement.sequence_id:
                    placement.put_aside(event)
                case worker_pb2.SequenceOutput() if event.moved:
                    self._moved(event, placement)
                case worker_pb2.SequenceOutput():
                    drawn = self._decoded(event, placement)
                case worker_pb2.PrefillEvent():
                    drawn = self._prefilled(event, placement)
            if drawn is not None:
                return drawn

    def _prefilled(self, event: worker_pb2.PrefillEvent, placement: Placement) -> Drawn | None:
        if event.HasField("handed_over"):
            placement.handed_over = True
            self.ledger.route.transfer.CopyFrom(event.handed_over.transfer)
            return None
        first = event.first_token
        if len(self._output) != len(placement.sequence.output_token_ids):
            return None  # said twice
        placement.prefill_done()
        self.ledger.prefilled(first)
        return self._accept((first.token,), first.finish_reason, first.prompt_logprobs, placement)

    def _decoded(self, output: worker_pb2.SequenceOutput, placement: Placement) -> Drawn | None:
        missing = len(self._output) - output.first_index
        if missing < 0:
            self._early[output.first_index] = output  # the prefill worker's token is still on its way
            return None
        fresh = tuple(output.tokens[missing:])
        if not fresh and not (output.finish_reason and missing == len(output.tokens)):
            return None  # said twice
        placement.handed_over = True
        self.ledger.decoded(output, len(fresh))
        drawn = self._accept(fresh, output.finish_reason, output.prompt_logprobs, placement)
        self._draws(placement)
        return dataclasses.replace(
            drawn, proposed_tokens=output.proposed_tokens, accepted_tokens=output.accepted_tokens
        )

    def _draws(self, placement: Placement) -> None:
        """Its decode worker does; which it leaves if that sends it away and the prefill worker is done with it."""
        if placement.decode_charge is not None:
            placement.decode_charge.draws = True
        if placement.decode is None or not placement.decode.sends_away(placement.sequence_id):
            return
        is_busy = any(task is not None and not task.done() for task in (self._moving, self._prefill_call))
        if placement.target is None and not is_busy:
            moving = move_away(self._placer, placement, self._need, self._next_name)
            self._moving = asyncio.get_running_loop().create_task(moving, name=f"move {placement.sequence_id}")

    def _moved(self, output: worker_pb2.SequenceOutput, placement: Placement) -> None:
        """Its decode worker has said all that it had to say."""
        if placement.target is None or output.first_index != len(self._output):
            raise TransferFailed("the sequence moved on, and nobody has it")
        self._early.update({ahead.first_index: ahead for ahead in placement.arrive()})
        assert placement.decode is not None
        self.ledger.moved(placement.decode.worker_id)

    def _accept(
        self,
        tokens: tuple[common_pb2.Token, ...],
        finish_reason: common_pb2.FinishReason,
        prompt_logprobs: Iterable[common_pb2.TokenLogprobs],
        placement: Placement,
    ) -> Drawn:
        drawn = Drawn(len(self._output), tokens, finish_reason, tuple(prompt_logprobs))
        self._output.extend(token.token_id for token in tokens)
        self._need.sequence.sampling.ClearField("prompt_logprobs")  # they go out with the first token
        if placement.decode_charge is not None:
            placement.decode_charge.add(len(tokens))
        return drawn

    # -- its end ------------------------------------------------------------------------------------------------------

    async def _cause(self, failure: Failure, placement: Placement) -> Failure:
        """A hand-over that its decode worker saw break off ended for a reason that the prefill worker knows, and may
        say a moment later."""
        call = self._prefill_call
        if call is None or failure.worker is not placement.decode or type(failure.error) is not TransferFailed:
            return failure
        await asyncio.wait({call}, timeout=LAST_WORD_S)
        while not placement.events.empty():
            event = placement.events.get_nowait()
            if isinstance(event, Failure) and event.worker in (placement.prefill, None):
                return event
        return failure

    def _as_ours(self, error: LegatoError) -> LegatoError:
        """A worker that says "cancelled" when nobody here did is on its way out."""
        return WorkerLost(error.message) if isinstance(error, RequestCancelled) else error

    def _lost(self, placement: Placement, error: LegatoError) -> None:
        """Raises the error when it has been tried often enough."""
        attempts = self.ledger.route.attempts
        logger.warning(
            "attempt %d of %s failed at token %d: %s", attempts, self._name, len(self._output), error.message
        )
        if attempts >= MAX_ATTEMPTS:
            raise error
        self._need.failed(placement, self._failed, error)

    async def _last_word(self, placement: Placement) -> None:
        """The answer may be complete before its prefill worker has said what the hand-over moved."""
        if self._prefill_call is None or placement.decode is None or not placement.handed_over:
            return
        await asyncio.wait({self._prefill_call}, timeout=LAST_WORD_S)
        while not placement.events.empty():
            event = placement.events.get_nowait()
            if isinstance(event, worker_pb2.PrefillEvent) and event.HasField("handed_over"):
                self.ledger.route.transfer.CopyFrom(event.handed_over.transfer)

    def _leave(self, placement: Placement, ended: bool) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        if self._moving is not None:
            self._moving.cancel()
        self._placer.drop_target(placement)
        call = self._prefill_call
        if ended:
            placement.close()
            if call is not None and not placement.handed_over:
                ending = self._end_quietly(call, placement)
                self._placer.registry.spawn(ending, name=f"end of {placement.sequence_id}")
        else:
            if call is not None:
                call.cancel()
            self._placer.give_up(placement)

    async def _end_quietly(self, call: asyncio.Task[bool], placement: Placement) -> None:
        """A Prefill call whose first token ended the answer gives its reservation back itself. If it fails, we do."""
        await asyncio.wait({call}, timeout=QUIET_END_S)
        if not call.done() or not call.result():
            call.cancel()
            self._placer.give_up(placement)
