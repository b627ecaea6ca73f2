"""The proxy between a client and two servers that speak as vLLM does, over real connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from bench.http_stream import HttpFailed, parse_head, post, send
from bench.nixl_proxy import Proxy
from bench.pools import PoolsFailed, complete

PARAMS = {"do_remote_prefill": True, "remote_block_ids": [[4, 5]], "remote_engine_id": "e", "remote_port": 1}
Answer = Callable[[dict[str, Any], asyncio.StreamWriter], Awaitable[None]]


class Pool:
    """One `vllm serve`: keeps what it was asked, answers by a function, notices when the other end goes away."""

    def __init__(self, answer: Answer, stays_open: bool = False) -> None:
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.gone = asyncio.Event()
        self._answer, self._stays_open = answer, stays_open

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (_, path, *_), headers = parse_head(await reader.readuntil(b"\r\n\r\n"))
        body = await reader.readexactly(int(headers["content-length"]))
        self.asked.append((path, headers, json.loads(body or b"{}")))
        await self._answer(self.asked[-1][2], writer)
        if not self._stays_open:
            writer.close()
        with contextlib.suppress(ConnectionError):
            await reader.read()
        self.gone.set()
        writer.close()


async def prefilled(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    body = json.dumps({"choices": [{"text": "x"}], "kv_transfer_params": PARAMS}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n" % len(data) + data + b"\r\n"


def event(*token_ids: int) -> bytes:
    return b"data: " + json.dumps({"choices": [{"text": "", "token_ids": token_ids}]}).encode() + b"\n\n"


async def decoded(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """The second event comes in two pieces, and a usage without choices at the end."""
    second = event(12, 13)
    usage = b'data: {"choices": []}\n\n'
    pieces = [event(11), second[:9], second[9:] + usage, b"data: [DONE]\n\n"]
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in pieces:
        writer.write(chunk(piece))
    writer.write(b"0\r\n\r\n")


Serve = Callable[..., Awaitable[int]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers = []

    async def start(connection: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> int:
        server = await asyncio.start_server(connection, "127.0.0.1", 0)
        servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    yield start
    for server in servers:
        server.close()


async def front(serve: Serve, prefill: Pool, decode: Pool) -> int:
    return await serve(Proxy(await serve(prefill.serve), await serve(decode.serve)).serve)


async def test_decode_gets_the_prompt_and_what_prefill_said(serve: Serve) -> None:
    prefill, decode = Pool(prefilled), Pool(decoded)
    port = await front(serve, prefill, decode)
    pieces = [piece async for piece in complete(port, [3, 4, 5], 3)]
    assert pieces == [(11,), (12, 13)]
    ((path, named, asked),), ((_, same_name, then),) = prefill.asked, decode.asked
    assert path == "/v1/completions"
    assert (asked["max_tokens"], asked["stream"]) == (1, False)
    assert asked["kv_transfer_params"]["do_remote_decode"] is True
    assert then["kv_transfer_params"] == PARAMS
    assert (then["max_tokens"], then["stream"], then["prompt"]) == (3, True, [3, 4, 5])
    assert asked["prompt"] == [3, 4, 5]
    assert named["x-request-id"] == same_name["x-request-id"]


async def test_lengths_of_the_answer_are_not_for_prefill(serve: Serve) -> None:
    prefill, decode = Pool(prefilled), Pool(decoded)
    port = await front(serve, prefill, decode)
    request = {"prompt": [1], "max_tokens": 9, "min_tokens": 9, "stream": True, "stream_options": {"include_usage": 1}}
    async with post(port, "/v1/completions", request, {}) as reply:
        await reply.body()
    (_, _, asked), (_, _, then) = prefill.asked[0], decode.asked[0]
    assert not {"min_tokens", "stream_options"} & set(asked)
    assert request.items() <= then.items()


async def test_other_paths_go_to_decode(serve: Serve) -> None:
    prefill, decode = Pool(prefilled), Pool(prefilled)
    port = await front(serve, prefill, decode)
    async with send(port, "GET", "/health") as reply:
        assert reply.status == 200
        assert json.loads(await reply.body())["kv_transfer_params"] == PARAMS
    assert [path for path, *_ in decode.asked] == ["/health"]
    assert prefill.asked == []


async def died(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def died_after_a_token(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(event(11)))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()


async def refused(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 No\r\nContent-Length: 4\r\n\r\nfull")


@pytest.mark.parametrize(("answer", "status"), [(died, 502), (refused, 503)])
async def test_a_prefill_pool_that_fails_is_told(serve: Serve, answer: Answer, status: int) -> None:
    decode = Pool(decoded)
    port = await front(serve, Pool(answer), decode)
    with pytest.raises(HttpFailed) as caught:
        async with post(port, "/v1/completions", {"prompt": [1]}, {}):
            pass
    assert caught.value.status == status
    assert decode.asked == []


async def test_half_an_answer_is_no_answer(serve: Serve) -> None:
    port = await front(serve, Pool(prefilled), Pool(died_after_a_token))
    answer = complete(port, [1], 5)
    assert await anext(answer) == (11,)
    with pytest.raises(PoolsFailed, match="broke off"):
        await anext(answer)


async def test_an_error_within_the_stream_is_one(serve: Serve) -> None:
    async def said(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(event(11)))
        writer.write(chunk(b'data: {"error": {"message": "KV load failed"}}\n\n') + b"0\r\n\r\n")

    port = await front(serve, Pool(prefilled), Pool(said))
    with pytest.raises(PoolsFailed, match="KV load failed"):
        async for _ in complete(port, [1], 5):
            pass


async def test_an_end_without_done_is_one(serve: Serve) -> None:
    async def said(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk(event(11)) + b"0\r\n\r\n")

    port = await front(serve, Pool(prefilled), Pool(said))
    with pytest.raises(PoolsFailed, match="without"):
        async for _ in complete(port, [1], 5):
            pass


@pytest.mark.parametrize("stuck_in", ["prefill", "decode"])
async def test_a_client_that_leaves_frees_who_worked_for_it(serve: Serve, stuck_in: str) -> None:
    async def silent(request: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        pass

    pools = {"prefill": Pool(prefilled), "decode": Pool(decoded)} | {stuck_in: Pool(silent, stays_open=True)}
    port = await front(serve, pools["prefill"], pools["decode"])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(complete(port, [1], 5)), 0.2)
    async with asyncio.timeout(5):
        await pools[stuck_in].gone.wait()
