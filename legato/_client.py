"""The client for threads. `_aio.py` is the same for asyncio; what both share is in _verbs.py and _exchange.py."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Unpack

import grpc

from legato import _rpc
from legato._exchange import Exchange
from legato._request import Prompt, Sampling, takes_sampling
from legato._retry import Retries
from legato._verbs import Unary, Verbs
from legato.errors import RequestCancelled
from legato.types import Answer, ClusterView, Message, Model, Piece


class Stream(Iterator[Piece]):
    """Pieces of an answer as they come. Leaving it (close, `with`, or dropping the last reference) cancels the request.

    The iteration raises a class of legato.errors. `answer` is what there is so far, whole once the iteration has ended.
    """

    def __init__(self, channels: _Channels, exchange: Exchange) -> None:
        self._channels = channels
        self._exchange = exchange
        self._left = threading.Event()
        self._call: Any = None
        with self._settled():
            self._open()

    @property
    def request_id(self) -> str:
        return self._exchange.request_id

    @property
    def answer(self) -> Answer:
        return self._exchange.answer()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        with self._settled():
            while not self._left.is_set():
                piece = self._receive()
                if piece is not None:
                    return piece
        raise StopIteration

    def close(self) -> None:
        """Cancels the request unless it has ended. Idempotent; another thread may call it."""
        if not self._left.is_set():
            self._left.set()
            self._call.cancel()
            self._exchange.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_call", None) is not None:
            self.close()

    def _open(self) -> None:
        send = self._exchange.open()
        with self._channels.of(send.address) as channel:
            method = _rpc.method_of(channel, "Inference", send.method)
            self._call = method(send.request, timeout=send.timeout_s, metadata=send.metadata)

    def _receive(self) -> Piece | None:
        """The next message, or the next send. Sets `_left` at the end."""
        try:
            response = next(self._call)
        except StopIteration:
            self._exchange.end()
            self._leave(None)
        except grpc.RpcError as error:
            if self._left.is_set():
                raise RequestCancelled("the stream was closed") from None
            if self._channels.is_closed:
                raise RequestCancelled(CLOSED) from None
            delay_s = self._exchange.failed(_rpc.Failure.of(error))
            if delay_s is None:
                self._leave(None)
            elif not self._left.wait(delay_s):
                self._open()
        else:
            return self._exchange.feed(response)
        return None

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Whatever ends the iteration ends the call too."""
        try:
            yield
        except BaseException as error:
            self._leave(error)
            raise

    def _leave(self, error: BaseException | None) -> None:
        self._left.set()
        if self._call is not None:
            self._call.cancel()
        self._exchange.close(error)


CLOSED = "the client is closed"


class _Channels:
    """One channel for each router, opened when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, grpc.Channel] = {}
        self.is_closed = False

    @contextlib.contextmanager
    def of(self, address: str) -> Iterator[grpc.Channel]:
        """To begin a call on. Raises RequestCancelled once the client is closed, also while the block runs."""
        with self._lock:
            if self.is_closed:
                raise RequestCancelled(CLOSED)
            if address not in self._open:
                self._open[address] = grpc.insecure_channel(address, options=_rpc.CHANNEL_OPTIONS)
            channel = self._open[address]
        try:
            yield channel
        except ValueError:  # how a closed channel refuses a call
            if self.is_closed:
                raise RequestCancelled(CLOSED) from None
            raise

    def close(self) -> None:
        with self._lock:
            self.is_closed = True
            for channel in self._open.values():
                channel.close()
            self._open.clear()


class Client:
    """A client of one cluster; threads may share it.

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

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends every request that still runs; later ones raise RequestCancelled. Idempotent."""
        self._channels.close()

    @takes_sampling
    def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Sends a prompt (text or token ids), and gives the answer piece by piece.

        model               "" = the only one served
        timeout_s           None = the client's
        request_id          the caller's own name for the request, for traces and errors; "" = a new one
        """
        return Stream(self._channels, self._verbs.generate(prompt, model, timeout_s, request_id, dict(sampling)))

    @takes_sampling
    def generate(
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
        return _whole(self.stream(prompt, model=model, timeout_s=timeout_s, request_id=request_id, **sampling))

    @takes_sampling
    def stream_chat(
        self,
        messages: Iterable[Message],
        *,
        model: str = "",
        timeout_s: float | None = None,
        request_id: str = "",
        **sampling: Unpack[Sampling],
    ) -> Stream:
        """Sends the turns of a chat under the model's own template, and gives the answer piece by piece.

        model               "" = the only one served
        timeout_s           None = the client's
        request_id          the caller's own name for the request, for traces and errors; "" = a new one
        """
        return Stream(self._channels, self._verbs.chat(messages, model, timeout_s, request_id, dict(sampling)))

    @takes_sampling
    def chat(
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
        return _whole(self.stream_chat(messages, model=model, timeout_s=timeout_s, request_id=request_id, **sampling))

    def tokenize(self, text: str | Iterable[Message], *, model: str = "", timeout_s: float | None = None) -> list[int]:
        """Token ids of a text as `generate` sees it, or of a chat's turns under the model's template."""
        token_ids: list[int] = self._call(self._verbs.tokenize(text, model), timeout_s)
        return token_ids

    def detokenize(self, token_ids: Iterable[int], *, model: str = "", timeout_s: float | None = None) -> str:
        text: str = self._call(self._verbs.detokenize(token_ids, model), timeout_s)
        return text

    def models(self, *, timeout_s: float | None = None) -> list[Model]:
        models: list[Model] = self._call(self._verbs.models(), timeout_s)
        return models

    def cluster(self, *, timeout_s: float | None = None) -> ClusterView:
        """Workers, queues, memory and times as the router sees them now."""
        cluster: ClusterView = self._call(self._verbs.cluster(), timeout_s)
        return cluster

    def _call(self, unary: Unary, timeout_s: float | None) -> Any:
        backoff, deadline_s = self._verbs.backoff(timeout_s)
        while True:
            address = self._verbs.endpoints.address
            left_s = max(0.0, deadline_s - time.monotonic())
            try:
                with self._channels.of(address) as channel:
                    method = _rpc.method_of(channel, unary.service, unary.method)
                    reply = method(unary.request, timeout=left_s, metadata=self._verbs.metadata())
            except grpc.RpcError as error:
                if self._channels.is_closed:
                    raise RequestCancelled(CLOSED) from None
                typed = _rpc.error_of(_rpc.Failure.of(error), address, "")
                delay_s = backoff.delay_after_s(typed, time.monotonic(), progressed=False)
            else:
                return unary.read(reply)
            self._verbs.endpoints.leave(address)
            time.sleep(delay_s)


def _whole(stream: Stream) -> Answer:
    with stream:
        for _ in stream:
            pass
    return stream.answer
