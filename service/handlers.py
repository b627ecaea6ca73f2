"""What stands before every handler of a server (authentication, parsing, trace context) and behind it (typed errors).

Handlers are wrapped once, when their service is added, and not by interceptors at every call. A handler sees messages,
may raise any LegatoError, and reads a request stream with `async for`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import context as trace_context

from service import logs, tracing
from service.auth import Authenticator
from service.status import abort
from spec.errors import InternalError, InvalidParameter, LegatoError

Behavior = Callable[[Any, grpc.aio.ServicerContext], Any]
Call = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class HandlerGuard:
    """`live` counts the calls of each service that run now (promise P3, and what a stopping server waits for)."""

    def __init__(self, authenticator: Authenticator) -> None:
        self.live: Counter[str] = Counter()
        self.idle = asyncio.Event()  # set while no call runs
        self.idle.set()
        self._authenticator = authenticator

    def guard(self, handler: grpc.RpcMethodHandler, service: str, *, internal: bool) -> grpc.RpcMethodHandler:
        """The same method with raw bytes as its request, so that nothing is parsed for a caller who may not call."""
        run = self._guarded(_call_of(handler), service, internal=internal)
        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        return make(run, request_deserializer=None, response_serializer=handler.response_serializer)

    def _guarded(self, call: Call, service: str, *, internal: bool) -> Call:
        async def run(request: Any, context: grpc.aio.ServicerContext) -> Any:
            self.live[service] += 1
            self.idle.clear()
            token: Any = None
            try:
                metadata = context.invocation_metadata() or ()
                self._authenticator.check(metadata, internal=internal)
                parent = tracing.extract(metadata)
                token = trace_context.attach(parent) if parent is not None else None
                return await call(request, context)
            except LegatoError as error:
                await abort(context, error)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # a failed request never stops the server
                if context.done() or context.cancelled() or isinstance(error, grpc.aio.InternalError):
                    raise asyncio.CancelledError from error  # the caller left; writing to it failed
                await abort(context, _as_internal(error, service))
            finally:
                self.live[service] -= 1
                if not self.live.total():
                    self.idle.set()
                if token is not None:
                    trace_context.detach(token)

        return run


def _call_of(handler: grpc.RpcMethodHandler) -> Call:
    """One coroutine function (request bytes, context) -> response or None for all kinds of handlers."""
    parse = _parser(handler.request_deserializer)
    behavior: Behavior = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
    streams_requests = handler.request_streaming

    async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
        parsed = _parse_each(request, parse) if streams_requests else parse(request)
        outcome = behavior(parsed, context)
        if not inspect.isasyncgen(outcome):
            return await outcome
        async with contextlib.aclosing(outcome):  # its `finally` runs now, not when the collector comes by
            async for response in outcome:
                await context.write(response)
        return None

    return call


def _parser(deserializer: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    name = getattr(getattr(deserializer, "__self__", None), "__name__", "message")

    def parse(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            raise InvalidParameter(f"is no valid {name}: {error}", field="request") from None

    return parse


async def _parse_each(requests: AsyncIterator[bytes], parse: Callable[[bytes], Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield parse(request)


def _as_internal(error: Exception, service: str) -> InternalError:
    error_id = secrets.token_hex(4)
    logs.get(__name__).error("defect %s in %s: %s", error_id, service, error, exc_info=error)
    return InternalError(f"a defect in {service}; its log says more under {error_id}", error_id=error_id)


_MAKERS: dict[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
