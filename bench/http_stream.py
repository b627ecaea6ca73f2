"""A POST over HTTP/1.1 with asyncio, a connection for each, and what an OpenAI server streams back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

DONE = b"[DONE]"


class HttpFailed(Exception):
    """A status that is not 200 (`status`, the server's words), or a connection that broke off (`status` 0)."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True, slots=True)
class Reply:
    """`head` is the status line and the headers as they came, with the empty line. close() ends the connection."""

    status: int
    head: bytes
    headers: Mapping[str, str]  # names in small letters
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def close(self) -> None:
        self.writer.close()

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, without chunk headers. Raises HttpFailed when it breaks off."""
        try:
            if self.headers.get("transfer-encoding", "").lower() == "chunked":
                while size := int(await self.reader.readline(), 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
            elif "content-length" in self.headers:
                yield await self.reader.readexactly(int(self.headers["content-length"]))
            else:
                yield await self.reader.read()
        except (OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise HttpFailed(f"the answer broke off: {error or type(error).__name__}") from error

    async def body(self) -> bytes:
        """Raises HttpFailed."""
        return b"".join([piece async for piece in self.pieces()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """JSON of each server-sent event until [DONE]. Raises HttpFailed for an end without it, or an error event."""
        rest = b""
        async for piece in self.pieces():
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                data = event.removeprefix(b"data: ")
                if data == DONE:
                    return
                found = json.loads(data)
                if "error" in found:
                    raise HttpFailed(_words(data), self.status)
                yield found
        raise HttpFailed("the answer ended without [DONE]")


@contextlib.asynccontextmanager
async def post(port: int, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> AsyncIterator[Reply]:
    """To 127.0.0.1. Leaving it closes the connection, by which the server knows that nobody waits any more.

    Raises HttpFailed, for a status that is not 200 too."""
    async with send(port, "POST", path, json.dumps(body).encode(), headers) as reply:
        if reply.status != 200:
            raise HttpFailed(_words(await reply.body()), reply.status)
        yield reply


@contextlib.asynccontextmanager
async def send(
    port: int, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> AsyncIterator[Reply]:
    """Raises HttpFailed when there is no answer."""
    writer = None
    try:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            named = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(body))}
            named |= {"Connection": "close", **(headers or {})}
            lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
            writer.write(f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode() + body)
            head = await reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError) as error:
            raise HttpFailed(f"no answer: {error or type(error).__name__}") from error
        status, found = parse_head(head)
        yield Reply(int(status[1]), head, found, reader, writer)
    finally:
        if writer is not None:
            writer.close()


def _words(body: bytes) -> str:
    """Of {"error": {"message": ...}}, or the body itself."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, LookupError):
        return body.decode(errors="replace")


def parse_head(head: bytes) -> tuple[list[str], dict[str, str]]:
    """(words of the first line, headers with names in small letters)"""
    first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return first.split(), {name.strip().lower(): value.strip() for name, _, value in pairs}
