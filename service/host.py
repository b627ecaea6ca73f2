"""A gRPC server as all three services have it: health, reflection, typed errors, authentication, graceful stop.

async with Host(config.host, config.port, internal_key=config.cluster_key) as host:
    host.add(add_DecodeServicer_to_server, servicer, "legato.v1.Decode", internal=True)
    host.set_serving("legato.v1.Decode", True)
    await stop.wait()
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Self

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health as health_service
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from pydantic import SecretStr

from service.auth import Authenticator
from service.channel import KEEPALIVE
from service.config import MAX_MESSAGE_BYTES
from service.handlers import HandlerGuard
from service.ports import free_port
from spec.errors import InvalidConfiguration

# Reflection and health answer anyone: load balancers and grpcurl have no key.
_HEALTH, _REFLECTION = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME


class Host:
    """Bound and answering from `__aenter__` on: a taken port is found before a model is loaded. Leaving it drains."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        internal_key: SecretStr | str | None = None,
        api_keys: Sequence[SecretStr | str] = (),
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        drain_s: float = 8.0,
    ) -> None:
        """Port 0 takes a free one. `internal_key` is the cluster's key (see service/auth.py): without one nobody may
        call internal services. Without `api_keys` the others answer anyone. `drain_s`: see stop()."""
        self.host = host
        self.port = port  # the real one from `__aenter__` on
        self._drain_s = drain_s
        self._guard = HandlerGuard(Authenticator(internal_key, api_keys))
        self._methods = _Methods()
        self._health = health_service.aio.HealthServicer()
        self._background: set[asyncio.Task[None]] = set()
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),  # two servers on one port would share its connections unseen
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),
                ("grpc.http2.max_ping_strikes", 0),
                *KEEPALIVE,
            ]
        )

    @property
    def address(self) -> str:
        """host:port, as a peer on the same network takes it."""
        return _join(self.host, self.port)

    def add(
        self, add_to_server: Callable[[Any, Any], None], servicer: object, service: str, *, internal: bool = False
    ) -> None:
        """`add_to_server` is the generated add_XServicer_to_server, `service` the full name of X, `internal` whether it
        wants the cluster's key. May be called while the server runs. NOT_SERVING until set_serving() says otherwise."""
        collected = _Collected()
        add_to_server(servicer, collected)
        assert service in collected.handlers, f"the servicer is of {sorted(collected.handlers)}, not of {service}"
        for method, handler in collected.handlers[service].items():
            self._methods.table[f"/{service}/{method}"] = self._guard.guard(handler, service, internal=internal)
        self._methods.services.add(service)
        self._add_open(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, self._reflection())
        self.set_serving(service, False)

    def set_serving(self, service: str, serving: bool) -> asyncio.Task[None]:
        """What health checks of the service answer; the server as a whole ("") serves while all its services do.

        The task is done when those who watch know.
        """
        task = asyncio.get_running_loop().create_task(self._set_serving(service, serving))
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _set_serving(self, service: str, serving: bool) -> None:
        self._methods.serving[service] = serving
        await self._health.set(service, _status(serving))
        await self._health.set("", _status(all(self._methods.serving.values())))

    async def __aenter__(self) -> Self:
        """Raises InvalidConfiguration for a host or a port that cannot be listened on."""
        await self._health.set("", _status(False))
        self._add_open(health_pb2_grpc.add_HealthServicer_to_server, self._health)
        self._add_open(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, self._reflection())
        self._server.add_generic_rpc_handlers((self._methods,))
        free_port(self.host, self.port)  # gRPC is content when one of a name's addresses is free, and says no reason
        try:
            self.port = self._server.add_insecure_port(_join(self.host, self.port))
        except RuntimeError as error:
            raise InvalidConfiguration(f"{_join(self.host, self.port)} cannot be listened on: {error}") from None
        await self._server.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Health says NOT_SERVING, calls get `drain_s` to end, the rest is cancelled. Idempotent."""
        await self._health.enter_graceful_shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._drain_s):
                await self._guard.idle.wait()
        await self._server.stop(grace=None)  # who watches health would hold a grace until its end

    def _reflection(self) -> object:
        names = [*self._methods.services, _HEALTH, _REFLECTION]
        return reflection.aio.ReflectionServicer(names, descriptor_pool.Default())

    def _add_open(self, add_to_server: Callable[[Any, Any], None], servicer: object) -> None:
        collected = _Collected()
        add_to_server(servicer, collected)
        for service, handlers in collected.handlers.items():
            self._methods.table.update({f"/{service}/{method}": handler for method, handler in handlers.items()})


class _Methods(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The server's table of methods; services may join while it runs."""

    def __init__(self) -> None:
        self.table: dict[str, grpc.RpcMethodHandler] = {}
        self.services: set[str] = set()
        self.serving: dict[str, bool] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self.table.get(handler_call_details.method)


class _Collected:
    """Stands in for a server while generated code adds its handlers."""

    def __init__(self) -> None:
        self.handlers: dict[str, dict[str, grpc.RpcMethodHandler]] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same handlers come by name below."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, grpc.RpcMethodHandler]) -> None:
        self.handlers[service] = handlers


def _status(serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    statuses = health_pb2.HealthCheckResponse
    return statuses.SERVING if serving else statuses.NOT_SERVING


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
