"""Connections to our own servers: bearer token and trace context on every call, dead peers noticed within about 3 s."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import grpc
from pydantic import SecretStr

from service import auth, tracing
from service.config import MAX_MESSAGE_BYTES

# A ping every second also while nothing is sent, and 2 s for its answer: gRPC's own threads answer it, so that a busy
# event loop is no dead peer. A peer that comes back on its address is found again within a second.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.http2.ping_timeout_ms", 2000),  # 60 s by default, and the keepalive's pings wait as long
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_OPTIONS = [
    *KEEPALIVE,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel never inherits another one's back-off
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # who may be asked again is the caller's decision
]


def channel(
    address: str, internal_key: SecretStr | str | None = None, max_message_bytes: int = MAX_MESSAGE_BYTES
) -> Channel:
    """To `host:port`. `internal_key` is the cluster's key: the token derived from it goes with every call."""
    return Channel(address, internal_key, max_message_bytes)


class Channel:
    """A grpc.aio channel as generated stubs take it. Calls get their metadata here: interceptors would cost more."""

    def __init__(self, address: str, internal_key: SecretStr | str | None, max_message_bytes: int) -> None:
        self.address = address
        limits = [
            ("grpc.max_send_message_length", max_message_bytes),
            ("grpc.max_receive_message_length", max_message_bytes),
        ]
        self._inner = grpc.aio.insecure_channel(address, options=[*_OPTIONS, *limits])
        token = auth.internal_token(internal_key) if internal_key is not None else None
        self._fixed = [(auth.HEADER, f"Bearer {token}")] if token is not None else []
        self.unary_unary = self._adding(self._inner.unary_unary)
        self.unary_stream = self._adding(self._inner.unary_stream)
        self.stream_unary = self._adding(self._inner.stream_unary)
        self.stream_stream = self._adding(self._inner.stream_stream)

    def _adding(self, make: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
        def made(*arguments: Any, **options: Any) -> Callable[..., Any]:
            inner = make(*arguments, **options)

            def call(request: Any = None, *, metadata: Any = None, **rest: Any) -> Any:
                return inner(request, metadata=(*self._fixed, *tracing.inject(), *(metadata or ())), **rest)

            return call

        return made

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()
