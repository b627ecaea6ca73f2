"""The proxy in front of vLLM's two pools: the prompt to prefill, and the kv_transfer_params that come back to decode.

    client ── /v1/completions ──▶ proxy ── max_tokens=1, do_remote_decode ──▶ prefill
                                  proxy ◀── kv_transfer_params ── prefill
    client ◀── tokens ── proxy ◀── tokens ── decode ◀── the same request, kv_transfer_params ── proxy

What decode streams is handed on as bytes, unread. A client that leaves closes the connection to whoever works for it.
A pool that does not answer is status 502. Every other path goes to decode as it came.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import secrets
from collections.abc import Coroutine
from typing import Any

import uvloop

from bench.http_stream import HttpFailed, Reply, parse_head, post, send

COMPLETIONS = "/v1/completions"
_READ_BYTES = 1 << 16
_PREFILL_ONLY = {"max_tokens": 1, "stream": False, "return_token_ids": False}
_OF_THE_ANSWER = ("stream_options", "min_tokens")
_REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Proxy:
    def __init__(self, prefill_port: int, decode_port: int) -> None:
        self._prefill_port, self._decode_port = prefill_port, decode_port

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            (method, path, *_), headers = parse_head(await reader.readuntil(b"\r\n\r\n"))
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            await _unless_gone(self._answer(method, path, body, writer), reader)
        except (OSError, asyncio.IncompleteReadError):
            writer.transport.abort()  # a half answer must not look like a whole one
        except HttpFailed as error:
            words = json.dumps({"error": {"message": str(error), "code": error.status or 502}}).encode()
            head = f"HTTP/1.1 {error.status or 502} Failed\r\nContent-Length: {len(words)}\r\nConnection: close\r\n\r\n"
            writer.write(head.encode() + words)
        finally:
            writer.close()

    async def _answer(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path != COMPLETIONS:
            async with send(self._decode_port, method, path, body) as reply:
                return await _hand_on(reply, writer)
        request, named = json.loads(body), {"X-Request-Id": secrets.token_hex(8)}
        prefill = {name: value for name, value in request.items() if name not in _OF_THE_ANSWER}
        prefill |= _PREFILL_ONLY | {"kv_transfer_params": _REMOTE_DECODE}
        async with post(self._prefill_port, path, prefill, named) as reply:
            params = json.loads(await reply.body())["kv_transfer_params"]
        async with send(
            self._decode_port, "POST", path, json.dumps(request | {"kv_transfer_params": params}).encode(), named
        ) as reply:
            await _hand_on(reply, writer)


async def _hand_on(reply: Reply, writer: asyncio.StreamWriter) -> None:
    writer.write(reply.head)
    while piece := await reply.reader.read(_READ_BYTES):
        writer.write(piece)
        await writer.drain()


async def _unless_gone(work: Coroutine[Any, Any, None], reader: asyncio.StreamReader) -> None:
    """Ends `work` once the client has closed its end."""
    at_work, gone = asyncio.create_task(work), asyncio.create_task(reader.read(1))
    try:
        await asyncio.wait({at_work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not at_work.done():
            at_work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await at_work


async def run(options: argparse.Namespace) -> None:
    proxy = Proxy(options.prefill_port, options.decode_port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", options.port)
    async with server:
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.nixl_proxy", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefill-port", type=int, required=True)
    parser.add_argument("--decode-port", type=int, required=True)
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
