"""Promise P5: never someone else's KV. What is wrong is refused, counted, computed again, and the answer is right."""

from __future__ import annotations

import asyncio
import random
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from cluster import KEY, Cluster, cluster, links_to
from tiny_llama import SHAPES, make_llama

import kvtransfer.memory
import kvtransfer.ucx_peer
import worker.endpoints
import worker.loop
import worker.outgoing
import worker.reserving
from kvtransfer import ticket as tickets
from kvtransfer.grids import Grid
from kvtransfer.memory import Fault, FaultKind, MemoryTransport
from legato.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.status import error_from_rpc
from service.wire import spoken
from spec.errors import TicketRefused, TransferFailed
from worker.landing import LandingCheck

PROMPT = [random.Random(3).randrange(3, 400) for _ in range(70)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


async def greedy(running: Cluster, prompt: list[int]) -> Any:
    return await running.client.generate(prompt, max_tokens=12, temperature=0.0, ignore_eos=True)


async def test_a_bit_that_flipped_on_the_way(model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take = LandingCheck.take
    flips = 0

    async def flip_first(check: LandingCheck, end_layer: int) -> None:
        nonlocal flips
        if flips == 0:
            landing = check.ranks[0].landing
            landing.view(-1)[landing[0].numel() * check.block_ids[0]].neg_()
            flips += 1
        await take(check, end_layer)

    async with cluster(model, redis_url, prefill=0) as running:
        expected = (await greedy(running, PROMPT)).token_ids
    async with cluster(model, redis_url) as running:
        monkeypatch.setattr(LandingCheck, "take", flip_first)
        answer = await greedy(running, PROMPT)
        assert flips == 1
        assert answer.token_ids == expected
        assert answer.route.attempts == 2
        assert running.workers["decode-0"].core.meter.refused_handoffs == 1
        await running.assert_as_at_start()


async def test_blocks_of_another_prompt(model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lands comes from where another prompt's KV lies."""
    copy = kvtransfer.ucx_peer.copy
    wrong = 0

    def shifted(grid: Grid, source: int, target: int) -> None:
        nonlocal wrong
        copy(grid, source, target)
        if grid.rows is not None and wrong == 0:
            wrong += 1
            copy(grid._replace(source_bases=grid.source_bases + grid.nbytes, rows=None), source, target)

    async with cluster(model, redis_url, prefill=0) as running:
        expected = (await greedy(running, PROMPT)).token_ids
    async with cluster(model, redis_url) as running:
        await greedy(running, [5] * 90)  # its KV lies in the prefill worker's blocks
        monkeypatch.setattr(kvtransfer.ucx_peer, "copy", shifted)
        answer = await greedy(running, PROMPT)
        assert wrong == 1
        assert answer.token_ids == expected
        assert running.workers["decode-0"].core.meter.refused_handoffs == 1
        await running.assert_as_at_start()


@pytest.mark.parametrize(("here", "there"), [("off", "always"), ("sampled", "always"), ("always", "off")])
async def test_who_receives_says_which_chunks_have_digests(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, here: str, there: str
) -> None:
    compare, came = LandingCheck.compare, []

    async def count(check: LandingCheck, sent: Sequence[bytes]) -> None:
        came.append(check.num_tokens)
        await compare(check, sent)

    monkeypatch.setattr(LandingCheck, "compare", count)
    async with cluster(
        model, redis_url, handoff={"digest": here, "digest_sample": 0.01}, decode_handoff={"digest": there}
    ) as running:
        answer = await greedy(running, PROMPT)
        assert answer.route.attempts == 1
        sent_tokens = answer.route.transfer.sent_tokens
        assert sent_tokens >= len(PROMPT)
        assert sum(came) == (sent_tokens if there == "always" else 0)
        await running.assert_as_at_start()


@pytest.mark.parametrize("kind", FaultKind)
async def test_a_link_with_a_fault(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, kind: FaultKind
) -> None:
    """The reference transport plays each fault on the first chunk; a peer that is not proven quiet frees nothing."""
    opening = [MemoryTransport()]
    monkeypatch.setattr(worker.endpoints, "open_transports", lambda names, host: ([opening.pop(0)], {}))
    asked, frees = 0, []
    release = kvtransfer.memory._MemoryPeer.release

    def unwilling(peer: Any) -> None:
        """Twice it cannot say that nothing is in flight."""
        nonlocal asked
        asked += 1
        frees.append(running.workers["decode-0"].core.reservations.totals()["freed"])
        if asked <= 2:
            raise TransferFailed("the owner does not confirm")
        release(peer)

    async with cluster(model, redis_url, prefill=0) as running:
        expected = (await greedy(running, PROMPT)).token_ids
    opening[:] = [near := MemoryTransport(), MemoryTransport()]  # of the prefill worker, of the decode worker
    async with cluster(model, redis_url) as running:
        near.inject(Fault(kind, delay_s=0.5))
        if kind in (FaultKind.FAIL, FaultKind.LOSE_PEER):
            monkeypatch.setattr(kvtransfer.memory._MemoryPeer, "release", unwilling)
        answer = await greedy(running, PROMPT)
        assert answer.token_ids == expected
        assert answer.route.attempts == (1 if kind is FaultKind.DELAY else 2)
        refused = running.workers["decode-0"].core.meter.refused_handoffs
        assert refused == (1 if kind in (FaultKind.TRUNCATE, FaultKind.CORRUPT) else 0)
        await running.assert_as_at_start()
        if frees:
            assert asked >= 3
            assert frees[:3] == [0, 0, 0], "freed before it was quiet"


async def test_tickets_that_open_nothing(model: Path, redis_url: str) -> None:
    """Forged, tampered with, replayed, of another life of the worker: each refused by its reason, and nothing held."""
    async with cluster(model, redis_url) as running:
        decode = running.workers["decode-0"].core
        async with channel(decode.record.address, KEY) as link:
            stub = worker_pb2_grpc.DecodeStub(link)
            subscription = stub.Subscribe(worker_pb2.SubscribeRequest(router_id="tester"))
            await subscription.read()
            reservation = await stub.Reserve(_reserve(decode.record, running.workers["prefill-0"].core.record))
            good = worker_pb2.Ticket.FromString(reservation.ticket.ticket)

            def altered(**fields: Any) -> worker_pb2.Ticket:
                ticket = worker_pb2.Ticket()
                ticket.CopyFrom(good)
                for name, value in fields.items():
                    setattr(ticket, name, value)
                return ticket

            forged = tickets.issue(b"not the cluster's key", good)
            await _refused(link, forged, "signature")
            tampered = worker_pb2.SignedTicket(
                ticket=altered(num_tokens=3).SerializeToString(), signature=reservation.ticket.signature
            )
            await _refused(link, tampered, "signature")
            key = KEY.encode()
            await _refused(link, tickets.issue(key, altered(consumer_epoch=7)), "restarted")
            with links_to(reservation) as open_link:
                await _refused(link, tickets.issue(key, altered(producer_epoch=7)), "epoch", open_link())
            await _refused(link, tickets.issue(key, altered(expires_unix_ns=1)), "expired")
            stale = altered()
            stale.block_generations[0] += 1
            with links_to(reservation) as open_link:
                await _refused(link, tickets.issue(key, stale), "generation", open_link())
            await stub.Abort(worker_pb2.AbortRequest(sequence_id=good.sequence_id))
            await _refused(link, reservation.ticket, "ended")  # replayed
            subscription.cancel()
        assert decode.meter.refused_handoffs == 6, "the last was given up by its router: nothing to be counted"
        await running.assert_as_at_start()


def _reserve(decode: worker_pb2.WorkerRecord, prefill: worker_pb2.WorkerRecord) -> worker_pb2.ReserveRequest:
    return worker_pb2.ReserveRequest(
        router_id="tester",
        sequence=worker_pb2.SequenceState(
            sequence_id="test.0.1",
            prompt_token_ids=PROMPT,
            sampling=common_pb2.SamplingParams(
                max_tokens=4, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=1
            ),
            deadline_unix_ns=time.time_ns() + 60_000_000_000,
        ),
        identity=decode.identity,
        producer_id=prefill.worker_id,
        producer_epoch=prefill.epoch,
    )


async def test_a_hand_over_by_a_link_that_is_not_open_does_not_begin(model: Path, redis_url: str) -> None:
    """What would be cut, were its writer silent, is something else or nothing, and proves nothing of this memory."""
    async with cluster(model, redis_url) as running:
        decode, prefill = running.workers["decode-0"].core, running.workers["prefill-0"].core.record
        async with channel(decode.record.address, KEY) as link:
            stub = worker_pb2_grpc.DecodeStub(link)
            subscription = stub.Subscribe(worker_pb2.SubscribeRequest(router_id="tester"))
            await subscription.read()
            reservation = await stub.Reserve(_reserve(decode.record, prefill))
            await _refused(link, reservation.ticket, "link", link_id=999)
            with links_to(reservation) as open_link:
                cut, known = open_link(), open_link()
                decode.cut("sockets", [worker_pb2.HandoffRequest.Link(link_id=cut)])
                await _refused(link, reservation.ticket, "link", link_id=cut)
                assert decode.live()["reservations.reservations_reserved"] == 1, "nothing has begun"
                stream = worker_pb2_grpc.WorkerStub(link).Handoff()
                await stream.write(_begin(reservation.ticket, prefill.address, known))
                assert (await stream.read()).HasField("accepted")
                await stream.write(worker_pb2.HandoffRequest(quiet=worker_pb2.HandoffRequest.Quiet()))
            subscription.cancel()
        assert decode.meter.refused_handoffs == 2
        await running.assert_as_at_start()


async def test_a_writer_whose_link_is_gone_connects_anew(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it does not look so from its own end, and nothing breaks there."""
    begun: list[int] = []
    async with cluster(model, redis_url, prefill=0) as running:
        expected = (await greedy(running, PROMPT)).token_ids
    async with cluster(model, redis_url) as running:
        decode = running.workers["decode-0"].core

        def has_link(link_id: int) -> bool:
            begun.append(link_id)
            return link_id != begun[0]

        for transport in decode.transports.values():
            monkeypatch.setattr(transport, "has_link", has_link)
        answer = await greedy(running, PROMPT)
        assert answer.token_ids == expected
        assert answer.route.attempts == decode.meter.refused_handoffs + 1 == 2
        assert begun[0] != begun[1]
        await running.assert_as_at_start()


async def _refused(link: grpc.aio.Channel, signed: worker_pb2.SignedTicket, word: str, link_id: int = 1) -> None:
    call = worker_pb2_grpc.WorkerStub(link).Handoff()
    await call.write(_begin(signed, "127.0.0.1:1", link_id))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(aiter(call))
    error = error_from_rpc(caught.value)
    assert isinstance(error, TicketRefused)
    assert word in str(error)


def _forged(ticket: worker_pb2.Ticket, earlier: worker_pb2.SignedTicket) -> worker_pb2.SignedTicket:
    return tickets.issue(b"not the cluster's key", ticket)


def _stale(ticket: worker_pb2.Ticket, earlier: worker_pb2.SignedTicket) -> worker_pb2.SignedTicket:
    ticket.block_generations[0] -= 1
    return tickets.issue(KEY.encode(), ticket)


def _of_another_revision(ticket: worker_pb2.Ticket, earlier: worker_pb2.SignedTicket) -> worker_pb2.SignedTicket:
    ticket.identity.revision += "-later"
    return tickets.issue(KEY.encode(), ticket)


def _replayed(ticket: worker_pb2.Ticket, earlier: worker_pb2.SignedTicket) -> worker_pb2.SignedTicket:
    return earlier


TICKETS = {_forged: "prefill-0", _stale: "decode-0", _of_another_revision: "prefill-0", _replayed: "prefill-0"}


@pytest.mark.parametrize("careless", [False, True], ids=["checking sender", "careless sender"])
@pytest.mark.parametrize("wrong", TICKETS, ids=lambda wrong: wrong.__name__)
async def test_a_ticket_that_is_wrong_costs_the_request_an_attempt_and_no_more(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch, wrong: Any, careless: bool
) -> None:
    """Who sends looks first and, where that one does not look, who receives."""
    issue = worker.reserving.signed_ticket
    issued: list[worker_pb2.SignedTicket] = []

    def issue_wrong(*arguments: Any) -> worker_pb2.SignedTicket:
        issued.append(issue(*arguments))
        if len(issued) != 2:
            return issued[-1]
        return wrong(worker_pb2.Ticket.FromString(issued[1].ticket), issued[0])

    def read_unseen(key: bytes, signed: worker_pb2.SignedTicket, *, now_unix_ns: int) -> worker_pb2.Ticket:
        return worker_pb2.Ticket.FromString(signed.ticket)

    async with cluster(model, redis_url, prefill=0) as running:
        expected = (await greedy(running, PROMPT)).token_ids
    async with cluster(model, redis_url) as running:
        monkeypatch.setattr(worker.reserving, "signed_ticket", issue_wrong)
        if careless:
            unchecked = types.SimpleNamespace(
                verify=read_unseen, check_sender=lambda *_, **__: None, prefix_digest=tickets.prefix_digest
            )
            monkeypatch.setattr(worker.outgoing, "tickets", unchecked)
        await greedy(running, [5] * 90)  # the ticket that is replayed
        answer = await greedy(running, PROMPT)
        assert answer.token_ids == expected
        assert answer.route.attempts == 2
        refused = {name: held.core.meter.refused_handoffs for name, held in running.workers.items()}
        refuser = "decode-0" if careless else TICKETS[wrong]
        assert refused == {"prefill-0": 0, "decode-0": 0, refuser: 1}
        assert (await greedy(running, PROMPT)).token_ids == expected, "what is left of it in caches is wrong"
        await running.assert_as_at_start()


async def test_a_stream_touches_only_what_its_ticket_opened(model: Path, redis_url: str) -> None:
    """A late word on an old stream, and a writer that was started again since where it was."""
    async with cluster(model, redis_url) as running:
        decode, prefill = running.workers["decode-0"].core, running.workers["prefill-0"].core.record
        async with channel(decode.record.address, KEY) as link:
            stub = worker_pb2_grpc.DecodeStub(link)
            subscription = stub.Subscribe(worker_pb2.SubscribeRequest(router_id="tester"))
            await subscription.read()
            earlier = worker_pb2.WorkerRecord()
            earlier.CopyFrom(prefill)
            earlier.epoch = prefill.epoch - 1  # as if prefill-0 had been started again since
            first = await stub.Reserve(_reserve(decode.record, earlier))
            old = worker_pb2_grpc.WorkerStub(link).Handoff()
            with links_to(first) as open_link:
                await old.write(_begin(first.ticket, prefill.address, open_link()))
                assert (await old.read()).HasField("accepted")
                await stub.Abort(worker_pb2.AbortRequest(sequence_id="test.0.1"))
                again = await stub.Reserve(_reserve(decode.record, prefill))
                old.cancel()  # it never said Quiet, and its successor's word is none of its own: its link is cut
                while decode.live()["reservations.reservations_cancelling"]:
                    await asyncio.sleep(0.02)
                assert decode.live()["reservations.reservations_reserved"] == 1, "the second placement is untouched"
                new = worker_pb2_grpc.WorkerStub(link).Handoff()
                await new.write(_begin(again.ticket, prefill.address, open_link()))
                assert (await new.read()).HasField("accepted")
                await new.write(worker_pb2.HandoffRequest(quiet=worker_pb2.HandoffRequest.Quiet()))
            subscription.cancel()
        await running.assert_as_at_start()


async def test_blocks_that_come_free_are_used_at_once(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for the blocks of a hand-over is woken when it ends, and not by the clock."""
    monkeypatch.setattr(worker.loop, "LONGEST_WAIT_S", 1e6)
    prompts = [[3 + index, *range(5, 114)] for index in range(6)]
    async with cluster(model, redis_url, prefill_engine={"num_blocks": 10}) as running:
        answers = (running.client.generate(prompt, max_tokens=4, ignore_eos=True, timeout_s=30) for prompt in prompts)
        assert len(await asyncio.gather(*answers)) == 6
        await running.assert_as_at_start()


def _begin(signed: worker_pb2.SignedTicket, address: str, link_id: int) -> worker_pb2.HandoffRequest:
    begin = worker_pb2.HandoffRequest.Begin(
        ticket=signed,
        producer_address=address,
        wire=spoken(),
        transport="sockets",
        links=[worker_pb2.HandoffRequest.Link(link_id=link_id)],
    )
    return worker_pb2.HandoffRequest(begin=begin)
