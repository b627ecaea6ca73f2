"""The client for asyncio; the same verbs as `_client.py`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import Any, Unpack

import grpc
import grpc.aio

from legato import _rpc
from legato._exchange import Exchange
from legato._request import Prompt, Sampling, takes_sampling
from legato._retry import Retries
from legato._verbs import Unary, Verbs
from legato.errors import RequestCancelled
from legato.types import Answer, ClusterView, Message, Model, Piece


class AsyncStream(AsyncIterator[Piece]):
    """Pieces of an answer as they come. Leaving it (close, `async with`, or dropping the last reference) cancels the
    request; so does cancelling the task that iterates.

    The iteration raises a class of legato.errors. `answer` is what there is so far, whole once the iteration has ended.
    """

    def __init__(self, channels: _Channels, exchange: Exchange) -> None:
        self._channels = channels
        self._exchange = exchange
        self._is_left = False
        self._call: Any = None
        with self._settled():
            self._open()

    @property
    def request_id(self) -> str:
        return self._exchange.request_id

    @property
    def answer(self) -> Answer:
        return self._exchange.answer()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Piece:
        with self._settled():
            while not self._is_left:
                piece = await self._receive()
                if piece is not None:
                    return piece
        raise StopAsyncIteration

    def close(self) -> None:
        """Cancels the request unless it has ended. Idempotent."""
        if not self._is_left:
            self._leave(None)

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_call", None) is not None:
            self.close()

    def _open(self) -> None:
        send = self._exchange.open()
        method = _rpc.method_of(self._channels.of(send.address), "Inference", send.method)
        self._call = method(send.request, timeout=send.timeout_s, metadata=send.metadata)

    async def _receive(self) -> Piece | None:
        """The next message, or the next send. Sets `_is_left` at the end."""
        try:
            with self._channels.waiting():
                response = await self._call.read()
        except grpc.RpcError as error:
            delay_s = self._exchange.failed(_rpc.Failure.of(error))
            if delay_s is None:
                self._leave(None)
            else:
                await asyncio.sleep(delay_s)
                self._open()
            return None
        if response is grpc.aio.EOF:
            self._exchange.end()
            self._leave(None)
            return None
        return self._exchange.feed(response)

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Whatever ends the iteration ends the call too."""
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException | None) -> None:
        self._is_left = True
        if self._call is not None:
            self._call.cancel()
        self._exchange.close(error)


CLOSED = "the client is closed"


class _Channels:
    """One channel for each router, opened when it is first needed: a channel belongs to the loop that runs then."""

    def __init__(self) -> None:
        self._open: dict[str, grpc.aio.Channel] = {}
        self.is_closed = False

    def of(self, address: str) -> grpc.aio.Channel:
        """Raises RequestCancelled once the client is closed."""
        if self.is_closed:
            raise RequestCancelled(CLOSED)
        if address not in self._open:
            self._open[address] = grpc.aio.insecure_channel(address, options=_rpc.CHANNEL_OPTIONS)
        return self._open[address]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """For a reply. A channel that is closed meanwhile cancels the call, which must not look as if the task that
        waits had been cancelled: it raises RequestCancelled."""
        try:
            yield
        except (asyncio.CancelledError, grpc.aio.UsageError):
            task = asyncio.current_task()
            if self.is_closed and not (task is not None and task.cancelling()):
                raise RequestCancelled(CLOSED) from None
            raise

    async def close(self) -> None:
        self.is_closed = True
        channels = list(self._open.values())
        self._open.clear()
        for channel in channels:
            await channel.close()


class AsyncClient:
    """A client of one cluster, for one event loop.

    address     HOST:PORT of a router, or of several with commas between: the next is tried when one does not answer
    timeout_s   from sending to the last token, all sends of a request together, where the call names no other
    api_key     for a cluster that asks for one
    retries     when a request is sent again; Retries(attempts=1) for never

    Every verb raises a class of legato.errors.
    """

    def __init__(
        self, address: str, *, timeout_s: float = 120.0, api_key: str | None = None, retries: Retries | None = None
    ) -> None:
        self._verbs = Verbs(address, timeout_s, api_key, retries or Retries())
        self._channels = _Channels()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends every request that still runs; later ones raise RequestCancelled. Idempotent."""
        await self._channels.close()

    @takes_sampling
    def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """Sends a prompt (text or token ids), and gives the answer piece by piece.

        model               "" = the only one served
        timeout_s           None = the client's
        request_id          the caller's own name for the request, for traces and errors; "" = a new one
        """
        return AsyncStream(self._channels, self._verbs.generate(prompt, model, timeout_s, request_id, dict(sampling)))

    @takes_sampling
    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Answer:
        """Sends a prompt (text or token ids), and gives the whole answer.

        model               "" = the only one served
        timeout_s           None = the client's
        request_id          the caller's own name for the request, for traces and errors; "" = a new one
        """
        return await _whole(self.stream(prompt, model=model, timeout_s=timeout_s, request_id=request_id, **sampling))

    @takes_sampling
    def stream_chat(
        self,
        messages: Iterable[Message],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """Sends the turns of a chat under the model's own template, and gives the answer piece by piece.

        model               "" = the only one served
        timeout_s           None = the client's
        request_id          the caller's own name for the request, for traces and errors; "" = a new one
        """
        return AsyncStream(self._channels, self._verbs.chat(messages, model, timeout_s, request_id, dict(sampling)))

    @takes_sampling
    async def chat(
        self,
        messages: Iterable[Message],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Answer:
        """Sends the turns of a chat under the model's own template, and gives the whole answer.

        model               "" = the only one served
        timeout_s           None = the client's
        request_id          the caller's own name for the request, for traces and errors; "" = a new one
        """
        stream = self.stream_chat(messages, model=model, timeout_s=timeout_s, request_id=request_id, **sampling)
        return await _whole(stream)

    async def tokenize(
        self, text: str | Iterable[Message], *, model: str = "", timeout_s: float | None = None
    ) -> list[int]:
        """Token ids of a text as `generate` sees it, or of a chat's turns under the model's template."""
        token_ids: list[int] = await self._call(self._verbs.tokenize(text, model), timeout_s)
        return token_ids

    async def detokenize(self, token_ids: Iterable[int], *, model: str = "", timeout_s: float | None = None) -> str:
        text: str = await self._call(self._verbs.detokenize(token_ids, model), timeout_s)
        return text

    async def models(self, *, timeout_s: float | None = None) -> list[Model]:
        models: list[Model] = await self._call(self._verbs.models(), timeout_s)
        return models

    async def cluster(self, *, timeout_s: float | None = None) -> ClusterView:
        """Workers, queues, memory and times as the router sees them now."""
        cluster: ClusterView = await self._call(self._verbs.cluster(), timeout_s)
        return cluster

    async def _call(self, unary: Unary, timeout_s: float | None) -> Any:
        backoff, deadline_s = self._verbs.backoff(timeout_s)
        while True:
            address = self._verbs.endpoints.address
            method = _rpc.method_of(self._channels.of(address), unary.service, unary.method)
            left_s = max(0.0, deadline_s - time.monotonic())
            call = method(unary.request, timeout=left_s, metadata=self._verbs.metadata())
            try:
                with self._channels.waiting():
                    return unary.read(await call)
            except grpc.RpcError as error:
                typed = _rpc.error_of(_rpc.Failure.of(error), address, "")
                delay_s = backoff.delay_after_s(typed, time.monotonic(), progressed=False)
            self._verbs.endpoints.leave(address)
            await asyncio.sleep(delay_s)


async def _whole(stream: AsyncStream) -> Answer:
    async with stream:
        async for _ in stream:
            pass
    return stream.answer
