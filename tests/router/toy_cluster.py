"""A small honest cluster: real gRPC servers that speak the worker protocol, around a toy model.

The toy's next token is a pure function of (seed, position, history), as the promise of sampling says; blocks,
reservations and hand-overs are counted for real, so that what a router forgets to release is seen. Faults are set on a
worker's `faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import time
from collections.abc import AsyncIterator, Callable

import grpc
from opentelemetry import trace

from legato.v1 import common_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from router.cluster import ClusterService, ControlService
from router.constraints import Constraints
from router.inference import InferenceService
from router.line import Line
from router.meter import Meter
from router.placer import Placer
from router.registry import Registry
from service.channel import Channel, channel
from service.host import Host
from service.status import reason_to_proto
from service.tokenizer import Tokenizer
from service.tracing import Spans
from spec.errors import LegatoError, OutOfBlocks, TransferFailed
from telemetry.setup import Telemetry, setup

KEY = "a key of the tests"
BLOCK_TOKENS = 4
EOS = 256
VOCAB = 300
_epochs = itertools.count(1)


def next_token(seed: int, history: list[int]) -> int:
    """The toy model: one token in 40 is EOS."""
    text = f"{seed} {len(history)} {history[-5:]}".encode()
    drawn = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return EOS if drawn % 40 == 0 else drawn % 256


def finish_of(sampling: common_pb2.SamplingParams, output: list[int]) -> int:
    if output[-1] in sampling.stop_token_ids or (output[-1] == EOS and not sampling.ignore_eos):
        return common_pb2.FINISH_REASON_STOP
    return common_pb2.FINISH_REASON_LENGTH if len(output) >= sampling.max_tokens else 0


def whole_answer(prompt: list[int], sampling: common_pb2.SamplingParams) -> list[int]:
    """What a cluster without faults must answer."""
    output: list[int] = []
    while not output or not finish_of(sampling, output):
        output.append(next_token(sampling.seed, prompt + output))
    return output


@dataclasses.dataclass
class Faults:
    """`*_once` are used up by their first use."""

    error_before_first_once: LegatoError | None = None
    error_after_first_once: LegatoError | None = None
    handoff_error_once: LegatoError | None = None
    handoff_error_delay_s: float = 0.0  # after the decode worker has heard Quiet
    die_before_first: bool = False
    die_after_first: bool = False
    prefill_delay_s: float = 0.0
    refuse_reserve: bool = False
    reserve_delay_s: float = 0.0
    die_after_tokens: int | None = None
    error_after_tokens_once: tuple[int, LegatoError] | None = None
    say_twice: bool = False
    silent: bool = False
    subscribe_fails: str = ""  # "at once", "after the first message"
    move_error_once: LegatoError | None = None
    move_delay_s: float = 0.0
    die_in_move: str = ""  # "before", "after" the target has the sequence
    move_word_delay_s: float = 0.0  # between Admitted and the last message of the sequence
    resume_after_move_once: bool = False  # the target has it, but its word was lost

    def once(self, name: str) -> LegatoError | None:
        error: LegatoError | None = getattr(self, name)
        setattr(self, name, None)
        return error


class ToyWorker(worker_pb2_grpc.WorkerServicer):
    """What both roles have. `kill()` is what peers see of a process that dies."""

    role = worker_pb2.ROLE_UNSPECIFIED

    def __init__(self, worker_id: str, total_blocks: int = 200, max_step_tokens: int = 32) -> None:
        self.faults = Faults()
        self.total_blocks = total_blocks
        self.calls = 0
        self.is_dead = False
        self.called_under: list[tuple[str, trace.SpanContext]] = []  # method, and the span that the caller sent along
        self.computed_tokens = 0
        self.waiting_tokens = 0  # of other routers
        self.host = Host("127.0.0.1", 0, internal_key=KEY, drain_s=0.001)
        self.record = worker_pb2.WorkerRecord(
            worker_id=worker_id,
            role=self.role,
            epoch=next(_epochs),
            identity=worker_pb2.ModelIdentity(model_id="toy", revision="r1", compute_dtype="float32"),
            kv_layout=worker_pb2.KVLayout(
                num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=BLOCK_TOKENS, dtype="float32"
            ),
            total_blocks=total_blocks,
            max_context_tokens=400,
            max_step_tokens=max_step_tokens,
            endpoints=[worker_pb2.TransportEndpoint(name="toy")],
            model_path="toy",
            vocab_size=VOCAB,
            eos_token_ids=[EOS],
        )

    async def start(self, register: Callable[[], None]) -> None:
        await self.host.__aenter__()
        register()
        self.host.add(worker_pb2_grpc.add_WorkerServicer_to_server, self, "legato.v1.Worker", internal=True)
        self.record.address = self.host.address

    async def kill(self) -> None:
        self.is_dead = True
        await self.host.stop()

    async def _die(self) -> None:
        """Within a call of its own."""
        asyncio.get_running_loop().create_task(self.kill())
        await asyncio.sleep(60)

    def load(self) -> worker_pb2.WorkerLoad:
        return worker_pb2.WorkerLoad(
            free_blocks=self.total_blocks, computed_tokens=self.computed_tokens, waiting_tokens=self.waiting_tokens
        )

    def called(self, method: str) -> None:
        self.called_under.append((method, trace.get_current_span().get_span_context()))

    async def Describe(self, request: worker_pb2.DescribeRequest, context: object) -> worker_pb2.WorkerRecord:
        return self.record

    async def GetCounts(self, request: worker_pb2.GetCountsRequest, context: object) -> worker_pb2.Counts:
        return worker_pb2.Counts(load=self.load(), live={"calls": self.calls})


class ToyPrefill(ToyWorker, worker_pb2_grpc.PrefillServicer):
    role = worker_pb2.PREFILL

    async def start(self) -> None:  # type: ignore[override]
        add = worker_pb2_grpc.add_PrefillServicer_to_server
        await super().start(lambda: self.host.add(add, self, "legato.v1.Prefill", internal=True))

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: object
    ) -> AsyncIterator[worker_pb2.PrefillEvent]:
        self.calls += 1
        self.called("Prefill")
        try:
            async for event in self._prefill(request):
                yield event
        finally:
            self.calls -= 1

    async def _prefill(self, request: worker_pb2.PrefillRequest) -> AsyncIterator[worker_pb2.PrefillEvent]:
        state, faults = request.sequence, self.faults
        queued_ns = time.time_ns()
        if error := faults.once("error_before_first_once"):
            raise error
        if faults.die_before_first:
            await self._die()
        await asyncio.sleep(faults.prefill_delay_s)
        history = [*state.prompt_token_ids, *state.output_token_ids]
        self.computed_tokens += len(history)
        token_id = next_token(state.sampling.seed, history)
        state.output_token_ids.append(token_id)
        finish = finish_of(state.sampling, list(state.output_token_ids))
        first = worker_pb2.PrefillEvent.FirstToken(
            token=common_pb2.Token(token_id=token_id),
            finish_reason=finish,
            queued_ns=queued_ns,
            started_ns=queued_ns,
            drawn_ns=time.time_ns(),
        )
        if state.sampling.HasField("prompt_logprobs"):
            first.prompt_logprobs.extend(
                common_pb2.TokenLogprobs(logprob=-float(i)) for i in state.prompt_token_ids[1:]
            )
        yield worker_pb2.PrefillEvent(first_token=first)
        if error := faults.once("error_after_first_once"):
            raise error
        if faults.die_after_first:
            await self._die()
        if request.HasField("reservation"):
            try:
                await self._hand_over(request, finished=bool(finish))
            except grpc.aio.AioRpcError as rpc_error:
                raise TransferFailed(f"the decode worker left: {rpc_error.details()}") from None
            if not finish:
                transfer = common_pb2.TransferStats(transport="memory", sent_tokens=len(history))
                yield worker_pb2.PrefillEvent(handed_over=worker_pb2.PrefillEvent.HandedOver(transfer=transfer))

    async def _hand_over(self, request: worker_pb2.PrefillRequest, finished: bool) -> None:
        messages = worker_pb2.HandoffRequest
        async with channel(request.decode_address, KEY) as to_decode:
            call = worker_pb2_grpc.WorkerStub(to_decode).Handoff()
            await call.write(messages(begin=messages.Begin(ticket=request.reservation.ticket)))
            if error := self.faults.once("handoff_error_once"):
                await call.write(messages(quiet=messages.Quiet()))
                await call.done_writing()
                await asyncio.sleep(self.faults.handoff_error_delay_s)
                raise error
            if finished:
                await call.write(messages(quiet=messages.Quiet(finished_without_handoff=True)))
            else:
                await call.write(messages(final=messages.Final(sequence=request.sequence)))
            await call.done_writing()
            async for reply in call:
                if reply.HasField("cancel"):
                    raise TransferFailed(reply.cancel.message)


@dataclasses.dataclass
class Running:
    state: worker_pb2.SequenceState
    blocks: int
    router_id: str
    told: bool = False
    admitted: bool = False


class ToyDecode(ToyWorker, worker_pb2_grpc.DecodeServicer):
    role = worker_pb2.DECODE

    def __init__(self, worker_id: str, total_blocks: int = 200, step_s: float = 0.001) -> None:
        super().__init__(worker_id, total_blocks)
        self.sequences: dict[str, Running] = {}
        self.most_sequences = 0
        self.subscribed = 0
        self.subscribers: dict[str, asyncio.Queue[worker_pb2.StepOutput | None]] = {}
        self.tokens = 0
        self.waiting_requests = self.preemptions = 0  # as it says
        self._step_s = step_s

    async def start(self) -> None:  # type: ignore[override]
        add = worker_pb2_grpc.add_DecodeServicer_to_server
        await super().start(lambda: self.host.add(add, self, "legato.v1.Decode", internal=True))
        self._stepping = asyncio.create_task(self._step_forever())

    async def kill(self) -> None:
        if self._stepping is not asyncio.current_task():
            self._stepping.cancel()
        await super().kill()

    @property
    def free_blocks(self) -> int:
        return self.total_blocks - sum(running.blocks for running in self.sequences.values())

    def load(self) -> worker_pb2.WorkerLoad:
        return worker_pb2.WorkerLoad(
            free_blocks=self.free_blocks,
            running_requests=len(self.sequences),
            waiting_requests=self.waiting_requests,
            preemptions=self.preemptions,
        )

    def _take(self, router_id: str, state: worker_pb2.SequenceState) -> Running:
        assert router_id in self.subscribers, "the router placed before it subscribed"
        assert state.sequence_id not in self.sequences
        tokens = len(state.prompt_token_ids) + state.sampling.max_tokens
        blocks = -(-tokens // BLOCK_TOKENS)
        if self.faults.refuse_reserve or blocks > self.free_blocks:
            raise OutOfBlocks(f"{blocks} blocks wanted, {self.free_blocks} are free")
        copy = worker_pb2.SequenceState()
        copy.CopyFrom(state)
        self.sequences[state.sequence_id] = Running(copy, blocks, router_id)
        self.most_sequences = max(self.most_sequences, len(self.sequences))
        return self.sequences[state.sequence_id]

    async def Reserve(self, request: worker_pb2.ReserveRequest, context: object) -> worker_pb2.Reservation:
        self.called("Reserve")
        await asyncio.sleep(self.faults.reserve_delay_s)
        self._take(request.router_id, request.sequence)
        ticket = worker_pb2.Ticket(sequence_id=request.sequence.sequence_id, producer_epoch=request.producer_epoch)
        return worker_pb2.Reservation(ticket=worker_pb2.SignedTicket(ticket=ticket.SerializeToString()))

    async def Admit(self, request: worker_pb2.AdmitRequest, context: object) -> worker_pb2.AdmitResponse:
        self.called("Admit")
        self._take(request.router_id, request.sequence).admitted = True
        return worker_pb2.AdmitResponse()

    async def Move(self, request: worker_pb2.MoveRequest, context: object) -> worker_pb2.MoveResponse:
        self.called("Move")
        if request.sequence_id not in self.sequences:
            raise TransferFailed("it does not run here")
        if error := self.faults.once("move_error_once"):
            raise error
        await asyncio.sleep(self.faults.move_delay_s)
        if self.faults.die_in_move == "before":
            await self._die()
        running = self.sequences.get(request.sequence_id)
        if running is None:
            raise TransferFailed("it has ended here")
        running.admitted = False
        ticket = worker_pb2.Ticket.FromString(request.reservation.ticket.ticket)
        try:
            await self._hand_over(request, running, ticket.sequence_id)
        except (TransferFailed, grpc.aio.AioRpcError) as error:
            running.admitted = True
            raise TransferFailed(f"the target left: {error}") from None
        if self.faults.die_in_move == "after":
            await self._die()
        if self.faults.resume_after_move_once:
            self.faults.resume_after_move_once, running.admitted = False, True
            raise TransferFailed("planted")
        await asyncio.sleep(self.faults.move_word_delay_s)
        self.sequences.pop(request.sequence_id, None)
        last = worker_pb2.StepOutput(load=self.load())
        last.sequences.add(sequence_id=request.sequence_id, first_index=len(running.state.output_token_ids), moved=True)
        self.subscribers[running.router_id].put_nowait(last)
        return worker_pb2.MoveResponse()

    async def _hand_over(self, request: worker_pb2.MoveRequest, running: Running, sequence_id: str) -> None:
        messages = worker_pb2.HandoffRequest
        state = worker_pb2.SequenceState()
        state.CopyFrom(running.state)
        state.sequence_id = sequence_id
        async with channel(request.target_address, KEY) as to_target:
            call = worker_pb2_grpc.WorkerStub(to_target).Handoff()
            await call.write(messages(begin=messages.Begin(ticket=request.reservation.ticket)))
            await call.write(messages(final=messages.Final(sequence=state)))
            await call.done_writing()
            admitted = False
            async for reply in call:
                admitted = admitted or reply.HasField("admitted")
            if not admitted:
                raise TransferFailed("it was not taken")

    async def Abort(self, request: worker_pb2.AbortRequest, context: object) -> worker_pb2.AbortResponse:
        self.sequences.pop(request.sequence_id, None)
        return worker_pb2.AbortResponse()

    async def Handoff(
        self, requests: AsyncIterator[worker_pb2.HandoffRequest], context: object
    ) -> AsyncIterator[worker_pb2.HandoffReply]:
        replies = worker_pb2.HandoffReply
        sequence_id = ""
        async for message in requests:
            match message.WhichOneof("event"):
                case "begin":
                    sequence_id = worker_pb2.Ticket.FromString(message.begin.ticket.ticket).sequence_id
                    yield replies(accepted=replies.Accepted())
                case "final" if (running := self.sequences.get(sequence_id)) is None:
                    yield replies(cancel=replies.Cancel(message="given up"))
                case "final":
                    running.state.CopyFrom(message.final.sequence)
                    running.admitted = True
                    yield replies(admitted=replies.Admitted())
                case "quiet":
                    running = self.sequences.pop(sequence_id, None)
                    if running is not None and not message.quiet.finished_without_handoff:
                        self._say_that_the_writer_stopped(running)

    def _say_that_the_writer_stopped(self, running: Running) -> None:
        error = TransferFailed("the writer stopped")
        output = worker_pb2.SequenceOutput(
            sequence_id=running.state.sequence_id, error=reason_to_proto(error), error_message=error.message
        )
        if running.router_id in self.subscribers:
            self.subscribers[running.router_id].put_nowait(worker_pb2.StepOutput(sequences=[output]))

    async def Subscribe(
        self, request: worker_pb2.SubscribeRequest, context: object
    ) -> AsyncIterator[worker_pb2.StepOutput]:
        self.subscribed += 1
        if self.faults.subscribe_fails == "at once":
            raise OutOfBlocks("planted")
        queue: asyncio.Queue[worker_pb2.StepOutput | None] = asyncio.Queue()
        self.subscribers[request.router_id] = queue
        try:
            yield worker_pb2.StepOutput(load=self.load())
            if self.faults.subscribe_fails:
                raise OutOfBlocks("planted")
            while (output := await queue.get()) is not None:
                yield output
        finally:
            self.subscribers.pop(request.router_id, None)
            for sequence_id, running in list(self.sequences.items()):
                if running.router_id == request.router_id:
                    del self.sequences[sequence_id]

    async def _step_forever(self) -> None:
        while True:
            await asyncio.sleep(self._step_s)
            outputs: dict[str, worker_pb2.StepOutput] = {}
            for running in [r for r in self.sequences.values() if r.admitted and not self.faults.silent]:
                self._draw(running, outputs.setdefault(running.router_id, worker_pb2.StepOutput()))
            for router_id, output in outputs.items():
                output.load.CopyFrom(self.load())
                if router_id in self.subscribers:
                    for _ in range(2 if self.faults.say_twice else 1):
                        self.subscribers[router_id].put_nowait(output)
            if self.faults.die_after_tokens is not None and self.tokens >= self.faults.die_after_tokens:
                await self.kill()
                return

    def _token(self, state: worker_pb2.SequenceState) -> int:
        return next_token(state.sampling.seed, [*state.prompt_token_ids, *state.output_token_ids])

    def _draw(self, running: Running, step: worker_pb2.StepOutput) -> None:
        state = running.state
        output = step.sequences.add(sequence_id=state.sequence_id, first_index=len(state.output_token_ids))
        failing = self.faults.error_after_tokens_once
        if failing is not None and len(state.output_token_ids) >= failing[0]:
            self.faults.error_after_tokens_once = None
            output.error, output.error_message = reason_to_proto(failing[1]), failing[1].message
            del self.sequences[state.sequence_id]
            return
        token_id = self._token(state)
        state.output_token_ids.append(token_id)
        self.tokens += 1
        output.tokens.add(token_id=token_id)
        output.finish_reason = finish_of(state.sampling, list(state.output_token_ids))
        if not running.told:
            running.told = True
            output.queued_ns = output.started_ns = output.drawn_ns = output.handed_over_ns = time.time_ns()
        if output.finish_reason:
            del self.sequences[state.sequence_id]


class ToyRouter:
    """The real router's parts, composed as its __main__ does, but told of workers by `apply` instead of by Redis."""

    def __init__(self, tokenizer: Tokenizer, max_waiting: int = 64, telemetry: Telemetry | None = None) -> None:
        telemetry = telemetry or setup("router-under-test")
        self.registry = Registry(
            "r0", dial=lambda address: channel(address, KEY), read_tokenizer=lambda path: tokenizer
        )
        self.line = Line(max_waiting)
        self.placer = Placer(self.registry, self.line)
        self.inference = InferenceService(
            self.registry, self.placer, Constraints(), Meter(telemetry), Spans(telemetry), 20.0
        )
        self.control = ControlService(self.registry, self.line, self.inference)
        self.cluster = ClusterService(self.registry, self.line, self.inference, lambda: True)
        self.host = Host("127.0.0.1", 0, internal_key=KEY, drain_s=1.0)
        self.workers: list[ToyWorker] = []

    async def __aenter__(self) -> ToyRouter:
        await self.host.__aenter__()
        self.host.add(inference_pb2_grpc.add_InferenceServicer_to_server, self.inference, "legato.v1.Inference")
        self.host.add(inference_pb2_grpc.add_ClusterServicer_to_server, self.cluster, "legato.v1.Cluster")
        self.client: Channel = channel(self.host.address, KEY)
        self.stub = inference_pb2_grpc.InferenceStub(self.client)
        self.cluster_stub = inference_pb2_grpc.ClusterStub(self.client)
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.client.close()
        await self.host.stop()
        await self.registry.close()
        for worker in self.workers:
            await worker.kill()

    async def join(self, *workers: ToyPrefill | ToyDecode) -> None:
        """Starts them, and waits until the router has linked them."""
        for worker in workers:
            await worker.start()
            self.workers.append(worker)
        self.apply()
        await self.until(
            lambda: all(self.registry.workers[w.record.worker_id].linked for w in workers) and self.registry.models()
        )

    def apply(self, *gone: ToyWorker) -> None:
        self.registry.apply({w.record.worker_id: w.record for w in self.workers if w not in gone})

    @staticmethod
    async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():
                await asyncio.sleep(0.002)

    async def at_rest(self) -> None:
        """Promise P3: nothing is held by anybody any more."""

        def rest() -> bool:
            workers = self.registry.workers.values()
            return (
                self.inference.meter.running_requests == 0
                and len(self.line) == 0
                and all(w.charged_tokens == 0 and w.requests == 0 and w.routes == 0 for w in workers)
                and self.registry.tasks == 0
                and not any(isinstance(w, ToyDecode) and w.sequences for w in self.workers if not w.is_dead)
                and not any(isinstance(w, ToyPrefill) and w.calls for w in self.workers if not w.is_dead)
            )

        with contextlib.suppress(TimeoutError):
            await self.until(rest, 5.0)
        held = [
            (w.record.worker_id, list(w.sequences)) for w in self.workers if isinstance(w, ToyDecode) and w.sequences
        ]
        counts = await self.control.GetCounts(worker_pb2.GetCountsRequest(), _no_context())
        assert rest(), f"{dict(counts.live)}, decode workers hold {held}"


def _no_context() -> grpc.aio.ServicerContext:
    return None  # type: ignore[return-value]
