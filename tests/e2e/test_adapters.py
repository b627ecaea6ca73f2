"""LoRA adapters as a client meets them: the answers of merged weights, and nobody's KV under another adapter's name."""

from __future__ import annotations

import asyncio
import random
import shutil
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cluster import KEY, Cluster, cluster
from tiny_adapters import LLAMA_MODULES, merged, write_adapter
from tiny_llama import SHAPES, load_reference, make_llama

import legato
import worker.sender
from engine.adapters import AdapterFiles
from engine.model_files import open_model
from kvtransfer import ticket as tickets
from legato.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.messages import with_adapter
from service.status import error_from_rpc
from service.wire import spoken
from spec.errors import InvalidModel, LegatoError, TicketRefused
from worker.landing import LandingCheck

PROMPT = [random.Random(5).randrange(3, 400) for _ in range(53)]
TOKENS = 12
World = tuple[Path, dict[str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model, and folders by name: "poems", "prose", and "other", which is no other name but another revision."""
    folder = tmp_path_factory.mktemp("adapters")
    base = make_llama(folder / "base", SHAPES[0])
    model = load_reference(base)
    written = {
        "poems": write_adapter(folder / "poems", model, LLAMA_MODULES, 5, 1),
        "prose": write_adapter(folder / "prose", model, ("k_proj", "down_proj"), 3, 2),
        "other": write_adapter(folder / "other", model, LLAMA_MODULES, 5, 3),
    }
    return base, {name: str(path) for name, path in written.items()}


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, tuple[int, ...]]:
    base, folders = world
    oracles = {"": load_reference(base)} | {name: merged(base, Path(path)) for name, path in folders.items()}
    found = {name: greedy_reference(oracle) for name, oracle in oracles.items()}
    assert len(set(found.values())) == len(found)
    return found


def greedy_reference(oracle: Any) -> tuple[int, ...]:
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(TOKENS):
            tokens.append(int(oracle(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(PROMPT) :])


def served(world: World, *names: str) -> dict[str, Any]:
    return {"adapters": {name: world[1][name] for name in names or ("poems", "prose")}}


async def ask(running: Cluster, adapter: str, **options: Any) -> legato.Answer:
    given = {"max_tokens": TOKENS, "temperature": 0.0, "ignore_eos": True} | options
    return await running.client.generate(PROMPT, adapter=adapter, **given)


@pytest.mark.parametrize(("prefill", "layout"), [(0, "tp1"), (1, "tp1"), (0, "tp2")])
async def test_answers_are_those_of_merged_weights(
    world: World, expected: Mapping[str, tuple[int, ...]], redis_url: str, prefill: int, layout: str
) -> None:
    """The same prompt with each adapter and with none: at once, then one by one with all of them in the caches."""
    engine = {**served(world), "layout": layout, "max_step_tokens": 24, "max_sequences": 8}
    names = ["", "poems", "prose"]
    async with cluster(world[0], redis_url, prefill=prefill, engine=engine) as running:
        first = await asyncio.gather(*(ask(running, name) for name in names))
        computed = await running.total("prefill" if prefill else "decode", "computed_tokens")
        again = [await ask(running, name) for name in names]
        recomputed = await running.total("prefill" if prefill else "decode", "computed_tokens") - computed
        await running.assert_as_at_start()
    for answers in (first, again):
        assert {name: answer.token_ids for name, answer in zip(names, answers, strict=True)} == {
            name: expected[name] for name in names
        }
    cached_tokens = len(PROMPT) // 16 * 16
    assert recomputed == computed - len(names) * cached_tokens, "each found its own blocks, and no others"
    for one, other in zip(first, again, strict=True):
        if prefill:
            assert one.route is not None and one.route.transfer is not None
            assert other.route is not None and other.route.transfer is not None
            assert (one.route.transfer.skipped_tokens, other.route.transfer.skipped_tokens) == (0, cached_tokens)


async def test_a_failover_keeps_the_adapter(
    world: World, expected: Mapping[str, tuple[int, ...]], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, flips = LandingCheck.take, 0

    async def flip_first(check: LandingCheck, end_layer: int) -> None:
        nonlocal flips
        if flips == 0:
            landing = check.ranks[0].landing
            landing.view(-1)[landing[0].numel() * check.block_ids[0]].neg_()
            flips += 1
        await take(check, end_layer)

    async with cluster(world[0], redis_url, engine=served(world)) as running:
        monkeypatch.setattr(LandingCheck, "take", flip_first)
        answer = await ask(running, "poems")
        await running.assert_as_at_start()
    assert answer.route is not None
    assert (flips, answer.route.attempts) == (1, 2)
    assert answer.token_ids == expected["poems"]


async def test_models_list_adapters_and_an_unknown_one_is_said_with_those_that_are_known(
    world: World, redis_url: str
) -> None:
    spec = open_model(world[0]).spec
    async with cluster(world[0], redis_url, prefill=0, engine=served(world)) as running:
        (model,) = await running.client.models()
        with pytest.raises(legato.errors.UnknownModel, match="no adapter 'peoms'; its adapters are poems, prose"):
            await ask(running, "peoms")
        with pytest.raises(legato.errors.InvalidParameter, match="adapter must be at most"):
            await ask(running, "p" * 65)
        chatted = await running.client.chat(
            [{"role": "user", "content": "hi"}], adapter="poems", max_tokens=4, temperature=0.0
        )
        await running.assert_as_at_start()
    assert [(each.name, each.revision) for each in model.adapters] == [
        (name, AdapterFiles(Path(world[1][name]), spec).revision) for name in ("poems", "prose")
    ]
    assert chatted.model == model.id


async def test_no_hand_over_between_two_revisions(
    world: World, expected: Mapping[str, tuple[int, ...]], redis_url: str
) -> None:
    """Both workers have "poems", each another: the router places it where one worker can do all of it."""
    other = {"adapters": {"poems": world[1]["other"]}}
    async with cluster(world[0], redis_url, prefill_engine=served(world, "poems"), decode_engine=other) as running:
        plain, answer = await ask(running, ""), await ask(running, "poems")
        (model,) = await running.client.models()
        await running.assert_as_at_start()
    assert plain.route is not None and plain.route.transfer is not None
    assert answer.route is not None and answer.route.prefill_worker_id == ""
    assert (plain.token_ids, answer.token_ids) == (expected[""], expected["other"])
    assert [each.name for each in model.adapters] == ["poems", "poems"]


async def test_a_ticket_is_of_one_adapter_in_one_revision(world: World, redis_url: str) -> None:
    """Promise P5, at each of its three doors: reserve, send, land."""
    other = {"adapters": {"poems": world[1]["other"], "prose": world[1]["prose"]}}
    async with cluster(world[0], redis_url, prefill_engine=served(world), decode_engine=other) as running:
        decode, prefill = running.workers["decode-0"].core, running.workers["prefill-0"].core.record
        ours, theirs = (_ids(record) for record in (prefill, decode.record))
        assert ours["poems"] != theirs["poems"]
        assert ours["prose"] == theirs["prose"]
        async with channel(decode.record.address, KEY) as to_decode, channel(prefill.address, KEY) as to_prefill:
            stub = worker_pb2_grpc.DecodeStub(to_decode)
            subscription = stub.Subscribe(worker_pb2.SubscribeRequest(router_id="tester"))
            await subscription.read()

            def reserve(sequence_adapter: str, asked: str) -> worker_pb2.ReserveRequest:
                state = worker_pb2.SequenceState(
                    sequence_id="test.0.1",
                    prompt_token_ids=PROMPT,
                    sampling=common_pb2.SamplingParams(max_tokens=4, seed=1),
                    deadline_unix_ns=1 << 62,
                    adapter=sequence_adapter,
                )
                return worker_pb2.ReserveRequest(
                    router_id="tester",
                    sequence=state,
                    identity=with_adapter(prefill.identity, asked),
                    producer_id=prefill.worker_id,
                    producer_epoch=prefill.epoch,
                )

            assert "no adapter" in await _refusal(stub.Reserve(reserve(ours["poems"], ours["poems"])))
            assert "another model" in await _refusal(stub.Reserve(reserve(theirs["poems"], ours["poems"])))
            assert "another model" in await _refusal(stub.Reserve(reserve("", ours["prose"])))
            asked = reserve(theirs["poems"], theirs["poems"])
            reservation = await stub.Reserve(asked)
            sending = worker_pb2_grpc.PrefillStub(to_prefill)
            for adapter, word in ((theirs["poems"], "no adapter"), (ours["poems"], "identity"), ("", "identity")):
                asked.sequence.adapter = adapter
                call = sending.Prefill(
                    worker_pb2.PrefillRequest(
                        sequence=asked.sequence, reservation=reservation, decode_address=decode.record.address
                    )
                )
                assert word in await _refusal(call.read())
            ticket = worker_pb2.Ticket.FromString(reservation.ticket.ticket)
            for adapter in (ours["poems"], theirs["prose"], ""):
                ticket.identity.adapter = adapter
                begin = worker_pb2.HandoffRequest.Begin(
                    ticket=tickets.issue(KEY.encode(), ticket), producer_address=prefill.address, wire=spoken()
                )
                stream = worker_pb2_grpc.WorkerStub(to_decode).Handoff()
                await stream.write(worker_pb2.HandoffRequest(begin=begin))
                assert "another model, adapter" in await _refusal(stream.read())
            assert decode.meter.refused_handoffs == 3
            await stub.Abort(worker_pb2.AbortRequest(sequence_id="test.0.1"))
            subscription.cancel()
        await running.assert_as_at_start()


async def test_a_sequence_state_of_another_adapter_is_refused(
    world: World, expected: Mapping[str, tuple[int, ...]], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its KV is right and its tokens are, and it would go on under other weights."""
    finish, changed = worker.sender.Sender.finish, 0

    async def finish_as_prose(sender: Any, state: worker_pb2.SequenceState) -> Any:
        nonlocal changed
        if changed == 0:
            changed += 1
            state.adapter = prose
        return await finish(sender, state)

    async with cluster(world[0], redis_url, engine=served(world)) as running:
        prose = _ids(running.workers["prefill-0"].core.record)["prose"]
        monkeypatch.setattr(worker.sender.Sender, "finish", finish_as_prose)
        answer = await ask(running, "poems")
        assert running.workers["decode-0"].core.meter.refused_handoffs == 1
        await running.assert_as_at_start()
    assert answer.route is not None
    assert (changed, answer.route.attempts, answer.token_ids) == (1, 2, expected["poems"])


def _ids(record: worker_pb2.WorkerRecord) -> dict[str, str]:
    return {adapter.name: f"{adapter.name}@{adapter.revision}" for adapter in record.adapters}


async def _refusal(call: Awaitable[object]) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error: LegatoError = error_from_rpc(caught.value)
    assert isinstance(error, TicketRefused), error
    return error.message


async def test_a_damaged_adapter_ends_the_start(world: World, redis_url: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(world[1]["poems"], broken)
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidModel, match=str(file)):
        async with cluster(world[0], redis_url, prefill=0, engine={"adapters": {"poems": str(broken)}}):
            pass
