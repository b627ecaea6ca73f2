"""One request over all its sends, without the waiting: what Stream and AsyncStream share.

open() ──▶ the call to make ──▶ feed(response) for each message ──▶ end()
  ▲                                  │ the call failed
  └── wait that long ◀── failed(error): seconds, or raises
"""

from __future__ import annotations

import dataclasses
import time

from legato import _rpc
from legato._answer import Assembly
from legato._retry import Backoff, Retries
from legato.errors import DeadlineExceeded, LegatoError
from legato.types import Answer, Piece
from legato.v1 import inference_pb2


@dataclasses.dataclass(slots=True)
class Endpoints:
    """The routers' addresses, and the one that answered last. Shared by the requests of one client."""

    addresses: list[str]
    current: int = 0

    def leave(self, address: str) -> None:
        """Goes on to the next address, unless another request already did."""
        if self.addresses[self.current] == address:
            self.current = (self.current + 1) % len(self.addresses)

    @property
    def address(self) -> str:
        return self.addresses[self.current]


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """What to call now."""

    address: str
    method: str
    request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest
    timeout_s: float
    metadata: list[tuple[str, str]]


class Exchange:
    """A streamed request. Not thread-safe; one consumer drives it."""

    def __init__(
        self,
        method: str,
        request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest,
        endpoints: Endpoints,
        retries: Retries,
        timeout_s: float,
        api_key: str | None,
    ) -> None:
        self.request_id = request.options.request_id
        self._sent_ns = time.monotonic_ns()
        self._deadline_s = self._sent_ns / 1e9 + timeout_s
        self._method = method
        self._request = request
        self._endpoints = endpoints
        self._address = endpoints.address
        self._backoff = Backoff(retries, len(endpoints.addresses), self._deadline_s)
        self._assembly = Assembly(request.options, time.time_ns())
        self._tokens_at_send = 0
        self._span = _rpc.start_span(self.request_id, method)
        self._metadata = _rpc.metadata_of(api_key, self._span)
        self._is_closed = False

    def open(self) -> Send:
        """The first send, or the next. Raises DeadlineExceeded when there is no time left for it."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("the request's deadline passed before it was sent", request_id=self.request_id)
        if self._backoff.sends > 1:
            self._assembly.prepare_resume(self._request.options)
        self._tokens_at_send = self._assembly.num_tokens
        self._address = self._endpoints.address
        return Send(self._address, self._method, self._request, left_s, self._metadata)

    def feed(self, response: inference_pb2.GenerateResponse) -> Piece | None:
        return self._assembly.feed(response, time.monotonic_ns() - self._sent_ns)

    def end(self) -> None:
        """The call ended well."""
        self._assembly.end()

    def failed(self, failure: _rpc.Failure) -> float | None:
        """The call ended with a status. Seconds to wait before `open()` again; None: the answer is whole all the same.

        Raises the typed error where sending again is not safe or cannot help."""
        if self._assembly.is_finished:
            return None
        error = _rpc.error_of(failure, self._address, self.request_id)
        progressed = self._assembly.num_tokens > self._tokens_at_send
        delay_s = self._backoff.delay_after_s(error, time.monotonic(), progressed)
        self._endpoints.leave(self._address)
        return delay_s

    def answer(self) -> Answer:
        return self._assembly.answer(self.request_id)

    def close(self, error: BaseException | None = None) -> None:
        """Ends the span; an error that ends the request is told whose it is and what had come. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            if isinstance(error, LegatoError):
                self._complete(error)
            self._span.set_attribute("legato.output_tokens", self._assembly.num_tokens)
            _rpc.end_span(self._span, error)

    def _complete(self, error: LegatoError) -> None:
        tokens = self._assembly.num_tokens
        error.request_id = error.request_id or self.request_id
        error.answer = self.answer()
        if tokens:
            error.details["tokens"] = str(tokens)
            error.message += f"; {tokens} {'tokens' if tokens > 1 else 'token'} of the answer had come"
