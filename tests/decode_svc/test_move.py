"""Decode.Move by hand, between two real workers: what the router relies on, whatever goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster import KEY, Cluster, cluster
from tiny_llama import SHAPES, make_llama

import decode_svc.move
from decode_svc.move import Move
from legato.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.status import error_from_rpc
from spec.errors import RequestCancelled, TicketRefused, TransferFailed
from worker.core import Core
from worker.receiver import Receiver

PROMPT = [3 + 7 * index % 401 for index in range(45)]
TOKENS = 150
STEP_S = 0.005
SAMPLING = {"temperature": 0.9, "seed": 11, "repetition_penalty": 1.2, "ignore_eos": True, "max_tokens": TOKENS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


class Caller:
    """A router of two decode workers, in few lines: what each says of each sequence, in the order of saying."""

    def __init__(self, running: Cluster) -> None:
        self.workers = [running.workers[f"decode-{index}"].core for index in range(2)]
        self.said: dict[str, list[worker_pb2.SequenceOutput]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self, stack: contextlib.AsyncExitStack) -> None:
        links = [await stack.enter_async_context(channel(core.record.address, KEY)) for core in self.workers]
        self.stubs = [worker_pb2_grpc.DecodeStub(link) for link in links]
        for stub in self.stubs:
            steps = stub.Subscribe(worker_pb2.SubscribeRequest(router_id="caller"))
            await steps.read()
            self._tasks.append(asyncio.create_task(self._follow(steps)))
            stack.callback(self._tasks[-1].cancel)

    async def _follow(self, steps: Any) -> None:
        while (step := await steps.read()) is not grpc.aio.EOF:
            for output in step.sequences:
                self.said.setdefault(output.sequence_id, []).append(output)

    def tokens(self, sequence_id: str) -> list[int]:
        """From its first index on, without a gap."""
        found: list[int] = []
        for output in self.said.get(sequence_id, ()):
            if found or output.tokens:
                assert output.first_index == self.first_index(sequence_id) + len(found)
            found += [token.token_id for token in output.tokens]
        return found

    def first_index(self, sequence_id: str) -> int:
        return self.said[sequence_id][0].first_index

    def ended(self, sequence_id: str) -> bool:
        return bool(self.said.get(sequence_id)) and bool(self.said[sequence_id][-1].finish_reason)

    async def admit(self, sequence_id: str = "source") -> None:
        await self.stubs[0].Admit(worker_pb2.AdmitRequest(router_id="caller", sequence=state(sequence_id, [])))

    async def reserve(self, output: list[int]) -> worker_pb2.Reservation:
        source, target = self.workers[0].record, self.workers[1].record
        request = worker_pb2.ReserveRequest(
            router_id="caller",
            sequence=state("target", output),
            identity=target.identity,
            producer_id=source.worker_id,
            producer_epoch=source.epoch,
        )
        return await self.stubs[1].Reserve(request)

    async def move(self, reservation: worker_pb2.Reservation, sequence_id: str = "source") -> worker_pb2.MoveResponse:
        """Raises the typed error."""
        address = self.workers[1].record.address
        request = worker_pb2.MoveRequest(sequence_id=sequence_id, reservation=reservation, target_address=address)
        try:
            return await self.stubs[0].Move(request)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from None


def state(sequence_id: str, output: list[int]) -> worker_pb2.SequenceState:
    return worker_pb2.SequenceState(
        sequence_id=sequence_id,
        prompt_token_ids=PROMPT,
        output_token_ids=output,
        sampling=common_pb2.SamplingParams(**SAMPLING),
        deadline_unix_ns=time.time_ns() + 60_000_000_000,
    )


@contextlib.asynccontextmanager
async def two_workers(model: Path, redis_url: str, **options: Any) -> AsyncIterator[tuple[Cluster, Caller, list[int]]]:
    """And what a sequence that stays where it is answers."""
    async with (
        cluster(model, redis_url, prefill=0, decode=2, **options) as running,
        contextlib.AsyncExitStack() as stack,
    ):
        for core in (running.workers[f"decode-{index}"].core for index in range(2)):
            slow_down(core)
        caller = Caller(running)
        await caller.open(stack)
        await caller.admit("undisturbed")
        await until(lambda: caller.ended("undisturbed"))
        undisturbed = caller.tokens("undisturbed")
        assert len(undisturbed) == TOKENS
        yield running, caller, undisturbed
        await running.assert_as_at_start()


def slow_down(core: Core) -> None:
    """Steps of a real model take their time; the sequence must outlive its move."""
    submit = core.executor.submit

    def slow(plans: Any, *given: Any) -> None:
        time.sleep(STEP_S)
        submit(plans, *given)

    core.executor.submit = slow  # type: ignore[method-assign]


async def until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_sequence_moves_while_it_runs(model: Path, redis_url: str) -> None:
    async with two_workers(model, redis_url) as (_, caller, undisturbed):
        await caller.admit()
        await until(lambda: len(caller.tokens("source")) >= 20)
        known = caller.tokens("source")
        reservation = await caller.reserve(known[:-1])
        answer = await caller.move(reservation)
        await until(lambda: caller.said["source"][-1].moved and caller.ended("target"))
        here, there = caller.tokens("source"), caller.tokens("target")
        assert len(here) > len(known), "it went on while its blocks moved"
        assert caller.said["source"][-1].first_index == len(here) == caller.first_index("target")
        assert here + there == undisturbed
        transfer = answer.transfer
        assert transfer.sent_tokens + transfer.skipped_tokens == len(PROMPT) + len(known) - 1
        assert [core.meter.moved_sequences for core in caller.workers] == [1, 0]


async def test_where_the_target_does_not_take_it_the_stream_goes_on_here(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up by the target at the last moment; and a target that has it, but whose word is late."""
    hand_over, late = Move._hand_over, 0.0

    async def given_up(move: Move, *arguments: Any) -> Any:
        await caller.stubs[1].Abort(worker_pb2.AbortRequest(sequence_id="target"))
        return await hand_over(move, *arguments)

    async def admit_late(receiver: Receiver, final: Any) -> None:
        await asyncio.sleep(late)
        await admit(receiver, final)

    admit = Receiver._admit
    monkeypatch.setattr(Receiver, "_admit", admit_late)
    monkeypatch.setattr(decode_svc.move, "ADMIT_TIMEOUT_S", 0.1)
    async with two_workers(model, redis_url) as (_, caller, undisturbed):
        for name in ("given up", "late"):
            await caller.admit(name)
            await until(lambda name=name: len(caller.tokens(name)) >= 20)
            reservation = await caller.reserve(caller.tokens(name)[:-1])
            with monkeypatch.context() as patch:
                if name == "given up":
                    patch.setattr(Move, "_hand_over", given_up)
                else:
                    late = 0.2
                with pytest.raises(RequestCancelled if name == "given up" else TransferFailed):
                    await caller.move(reservation, name)
            if name == "late":
                await until(lambda: caller.tokens("target"))
                await caller.stubs[1].Abort(worker_pb2.AbortRequest(sequence_id="target"))
            await until(lambda name=name: caller.ended(name))
            assert caller.tokens(name) == undisturbed
        assert [core.meter.moved_sequences for core in caller.workers] == [0, 0]


async def test_what_is_refused_changes_nothing(model: Path, redis_url: str) -> None:
    """Tokens that the sequence does not have; one that is not here; one that moves already."""
    async with two_workers(model, redis_url) as (_, caller, undisturbed):
        await caller.admit()
        await until(lambda: len(caller.tokens("source")) >= 10)
        known = caller.tokens("source")
        other = await caller.reserve([*known[:-2], (known[-2] + 1) % 400])
        with pytest.raises(TicketRefused):
            await caller.move(other)
        await caller.stubs[1].Abort(worker_pb2.AbortRequest(sequence_id="target"))
        right = await caller.reserve(known[:-1])
        with pytest.raises(TransferFailed):
            await caller.move(right, "nobody")
        both = await asyncio.gather(caller.move(right), caller.move(right), return_exceptions=True)
        assert sorted(type(each).__name__ for each in both) == ["MoveResponse", "TransferFailed"]
        await until(lambda: caller.ended("target"))
        assert caller.tokens("source") + caller.tokens("target") == undisturbed


@pytest.mark.parametrize("when", ["sending", "held"])
async def test_a_sequence_that_is_given_up_on_its_way_leaves_nothing(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """By the client, in each part of the move; two_workers() looks at every count of both."""

    async def abort(move: Move, *arguments: Any) -> Any:
        await caller.stubs[0].Abort(worker_pb2.AbortRequest(sequence_id="source"))
        await asyncio.sleep(0.02)
        return await going_on(move, *arguments)

    name = "_hand_over" if when == "held" else "_unless_ended"
    going_on = getattr(Move, name)
    async with two_workers(model, redis_url) as (_, caller, _):
        await caller.admit()
        await until(lambda: len(caller.tokens("source")) >= 10)
        reservation = await caller.reserve(caller.tokens("source")[:-1])
        monkeypatch.setattr(Move, name, abort)
        with pytest.raises(RequestCancelled):
            await caller.move(reservation)
        await caller.stubs[1].Abort(worker_pb2.AbortRequest(sequence_id="target"))
        assert not any(output.finish_reason for output in caller.said["source"])


async def test_a_sequence_that_ends_on_its_way_ends_here(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = Move._send

    def send_slowly(move: Move, sender: Any) -> None:
        send(move, sender)
        sent = sender.sent

        async def later() -> None:
            await asyncio.sleep(30)
            await sent()

        sender.sent = later

    monkeypatch.setattr(Move, "_send", send_slowly)
    async with two_workers(model, redis_url) as (_, caller, undisturbed):
        await caller.admit()
        await until(lambda: len(caller.tokens("source")) >= 100)
        reservation = await caller.reserve(caller.tokens("source")[:-1])
        with pytest.raises(RequestCancelled):
            await caller.move(reservation)
        await until(lambda: caller.ended("source"))
        assert caller.tokens("source") == undisturbed
        assert "target" not in caller.said, "the router has the whole answer: it hears of no failure"


@pytest.mark.parametrize("taken", [True, False])
async def test_a_sequence_that_is_preempted_on_its_way_moves_or_goes_on(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Its blocks are gone, and written by others, before all of them were sent: what the target gets was held."""
    send, armed, preempted = Move._send, threading.Event(), threading.Event()

    def send_and_preempt(move: Move, sender: Any) -> None:
        send(move, sender)
        armed.set()
        assert preempted.wait(5), "the event loop waits here, so that nothing was sent before"

    async def refused(move: Move, *arguments: Any) -> Any:
        assert preempted.is_set()
        raise TransferFailed("planted")

    async with two_workers(model, redis_url) as (_, caller, undisturbed):
        core = caller.workers[0]
        lane = core.scheduler.schedulers[0]
        plan = lane.plan

        def plan_others(now_s: float) -> Any:
            sequence = lane.sequence("source")
            if armed.is_set() and not preempted.is_set() and sequence is not None and not sequence.in_flight:
                lane._preempt(sequence)
                taken_by_others = lane.pool.allocate(lane.pool.available)
                core.engine.kv.tensor[taken_by_others] = 1.0
                lane.pool.release(taken_by_others)
                preempted.set()
            return None if armed.is_set() else plan(now_s)

        lane.plan, lane.plan_ahead = plan_others, lambda *_: None  # type: ignore[method-assign]
        await caller.admit()
        await until(lambda: len(caller.tokens("source")) >= 20)
        reservation = await caller.reserve(caller.tokens("source")[:-1])
        monkeypatch.setattr(Move, "_send", send_and_preempt)
        if not taken:
            monkeypatch.setattr(Move, "_hand_over", refused)
        with contextlib.nullcontext() if taken else pytest.raises(TransferFailed):
            await caller.move(reservation)
        assert preempted.is_set()
        armed.clear()
        core.loop.wake()
        if not taken:
            await caller.stubs[1].Abort(worker_pb2.AbortRequest(sequence_id="target"))
        await until(lambda: caller.ended("target" if taken else "source"))
        assert caller.tokens("source") + caller.tokens("target") == undisturbed
