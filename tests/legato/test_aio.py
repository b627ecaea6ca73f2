"""The client for asyncio: the same verbs, and what is different there (tasks, server-side CANCELLED)."""

from __future__ import annotations

import asyncio
import gc
import inspect

import grpc
import pytest

import legato
from legato import errors

QUICK = legato.Retries(attempts=4, first_delay_s=0.01, max_delay_s=0.05)


@pytest.fixture
async def client(router):
    async with legato.AsyncClient(router.address, timeout_s=10, retries=QUICK) as client:
        yield client


def test_both_clients_have_the_same_verbs():
    for name, method in inspect.getmembers(legato.Client, inspect.isfunction):
        if not name.startswith("_"):
            twin = getattr(legato.AsyncClient, name)
            assert list(inspect.signature(twin).parameters) == list(inspect.signature(method).parameters), name
            assert inspect.getdoc(twin) == inspect.getdoc(method), name


async def test_streams_at_once(client, expected):
    async def one(seed):
        stream = client.stream("abc", max_tokens=20, seed=seed)
        indices = [piece.index async for piece in stream]
        assert indices == list(range(20))
        return list(stream.answer.token_ids)

    assert await asyncio.gather(*(one(seed) for seed in range(8))) == [expected(seed, 20) for seed in range(8)]


async def test_every_verb(client, expected):
    assert list((await client.generate([1, 2], max_tokens=3, seed=1)).token_ids) == expected(1, 3)
    answer = await client.chat([{"role": "user", "content": "hi"}], max_tokens=3, seed=1, n=2)
    assert [list(choice.token_ids) for choice in answer.choices] == [expected(1, 3), expected(2, 3)]
    async with client.stream_chat([{"role": "user", "content": "hi"}], max_tokens=2) as stream:
        assert [piece.index async for piece in stream] == [0, 1]
    assert await client.tokenize("hi") == [104, 105]
    assert await client.detokenize([104, 105]) == "hi"
    assert (await client.models())[0].id == "toy"
    assert (await client.cluster()).router_id == "toy-router"


@pytest.mark.parametrize("how", ["close", "drop", "task", "timeout"])
async def test_leaving_cancels(client, router, script, how):
    router.toy.scripts.append(script(hang_after_tokens=1))
    stream = client.stream("abc", max_tokens=5)
    await anext(stream)
    if how == "close":
        stream.close()
        assert [piece async for piece in stream] == []
    elif how == "drop":
        del stream
        gc.collect()
    elif how == "task":
        task = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    else:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(stream)
    assert await asyncio.to_thread(router.toy.cancelled.wait, 5)


async def test_a_servers_cancel_is_a_status_and_is_sent_again(client, router, script, expected):
    router.toy.scripts.append(script(fail_after_tokens=2, status=grpc.StatusCode.CANCELLED))
    assert list((await client.generate("abc", max_tokens=5, seed=1)).token_ids) == expected(1, 5)
    router.toy.scripts.append(script(fail_after_tokens=0, status=grpc.StatusCode.CANCELLED))
    assert await client.tokenize("hi") == [104, 105]


async def test_resumes_and_fails_over(make_router, script, expected):
    first, second = make_router(), make_router()
    first.toy.scripts.append(script(hang_after_tokens=3))
    async with legato.AsyncClient(f"{first.address},{second.address}", retries=QUICK, timeout_s=10) as client:
        stream = client.stream("abc", max_tokens=6, seed=4)
        got = [await anext(stream) for _ in range(3)]
        await asyncio.to_thread(first.stop)
        got += [piece async for piece in stream]
    assert [piece.index for piece in got] == list(range(6))
    assert list(stream.answer.token_ids) == expected(4, 6)
    assert list(second.toy.requests[0].options.resume[0].ids) == expected(4, 3)


async def test_typed_errors(client, router, script):
    router.toy.scripts += [
        script(fail_after_tokens=0, reason="UNKNOWN_MODEL", status=grpc.StatusCode.NOT_FOUND),
        script(skip_index=1),
        script(hang_after_tokens=1),
    ]
    with pytest.raises(errors.UnknownModel):
        await client.generate("abc")
    with pytest.raises(errors.InternalError):
        await client.generate("abc", max_tokens=4)
    with pytest.raises(errors.DeadlineExceeded):
        await client.generate("abc", max_tokens=4, timeout_s=0.2)


async def test_an_error_brings_what_there_is_of_the_answer(client, router, script, expected):
    router.toy.scripts += [script(fail_after_tokens=3, reason="WORKER_LOST")] + [script(fail_after_tokens=0)] * 4
    with pytest.raises(errors.Unreachable) as caught:
        await client.generate("abc", max_tokens=6, seed=4)
    assert list(caught.value.answer.token_ids) == expected(4, 3)
    assert caught.value.details["first_reason"] == "WORKER_LOST"
    assert "3 tokens of the answer had come" in str(caught.value)


async def test_a_closed_client_says_so(client, router, script):
    router.toy.scripts.append(script(hang_after_tokens=1))
    stream = client.stream("abc", max_tokens=5)
    await anext(stream)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0.05)
    await client.close()
    with pytest.raises(errors.RequestCancelled, match="the client is closed") as caught:
        await reading
    assert caught.value.details["tokens"] == "1"
    await client.close()
    with pytest.raises(errors.RequestCancelled, match="the client is closed"):
        client.stream("abc")
    for verb in (lambda: client.generate("abc"), client.models, lambda: client.tokenize("a")):
        with pytest.raises(errors.RequestCancelled, match="the client is closed"):
            await verb()
    assert len(router.toy.requests) == 1


async def test_the_ledger_sums(client):
    ledger = (await client.generate("abc", max_tokens=3)).ledger
    assert ledger.total_s == pytest.approx(ledger.second_token_s, abs=1e-6)
