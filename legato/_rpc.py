"""What both clients know of gRPC: addresses, channel options, metadata, status -> error, trace context."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import grpc
from google.rpc import error_details_pb2, status_pb2
from opentelemetry import propagate, trace

from legato import errors
from legato.v1 import common_pb2, inference_pb2_grpc

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_send_message_length", -1),  # the router judges sizes
    ("grpc.max_receive_message_length", 64 << 20),  # log-probabilities of a long prompt come as one message
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5000),  # how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 10_000),  # a router that vanished without a word is noticed in 15 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new client never inherits the back-off of an older one
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),  # sending again is decided in _retry.py alone
]
SHUT_DOWN = "Cancelling all calls"  # the words of gRPC's server with the GOAWAY that ends its connections
_BY_STATUS: dict[grpc.StatusCode, type[errors.LegatoError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
    grpc.StatusCode.CANCELLED: errors.Draining,  # not by us, then nobody asks: the router stopped
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidParameter,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Unauthenticated,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
}
_ADDRESS = re.compile(r"(\[[^\s\[\]/]+\]|[^\s\[\]/:@]+):([0-9]{1,5})")
_TRACER = trace.get_tracer("legato")


def addresses_of(target: object) -> list[str]:
    """ "a:1,b:2" -> ["a:1", "b:2"]. Raises InvalidParameter for what is no HOST:PORT (an IPv6 address has brackets)."""
    addresses = [one.strip() for one in target.split(",") if one.strip()] if isinstance(target, str) else []
    ports = [_ADDRESS.fullmatch(address) for address in addresses]
    wrong = [one for one, port in zip(addresses, ports, strict=True) if not (port and 0 < int(port[2]) < 65536)]
    if wrong or not addresses:
        raise errors.InvalidParameter(
            f"address must be HOST:PORT, or several with commas between, is {wrong[0] if wrong else target!r}",
            details={"field": "address"},
        )
    return addresses


def start_span(request_id: str, method: str) -> trace.Span:
    attributes = {"legato.request_id": request_id, "legato.method": method}
    return _TRACER.start_span("legato.client", kind=trace.SpanKind.CLIENT, attributes=attributes)


def end_span(span: trace.Span, error: BaseException | None) -> None:
    if error is not None:
        span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
    span.end()


def metadata_of(api_key: str | None, span: trace.Span | None) -> list[tuple[str, str]]:
    """The bearer token, and the W3C trace context of the span (of whatever span is current, where none is given)."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier, trace.set_span_in_context(span) if span is not None else None)
    metadata = [(key.lower(), value) for key, value in carrier.items()]
    if api_key:
        metadata.append(("authorization", f"Bearer {api_key}"))
    return metadata


def method_of(channel: Any, service: str, method: str) -> Any:
    """The callable of "Inference" or "Cluster", on a channel of either kind."""
    return getattr(getattr(inference_pb2_grpc, f"{service}Stub")(channel), method)


class Failure(NamedTuple):
    """How a call ended, where it did not end well."""

    code: grpc.StatusCode
    message: str
    trailing: Iterable[tuple[str, Any]]

    @classmethod
    def of(cls, error: Any) -> Failure:
        """From a grpc.RpcError of either kind of channel."""
        return cls(error.code(), error.details() or "", error.trailing_metadata() or ())


def error_of(failure: Failure, address: str, request_id: str) -> errors.LegatoError:
    """The typed error of a call that failed: by its google.rpc.ErrorInfo, or by its status where it has none."""
    code, message, trailing = failure
    for key, value in trailing:
        if key == "grpc-status-details-bin":
            status = status_pb2.Status.FromString(value)
            for detail in status.details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info) and info.domain == "legato":
                    return _from_info(info, status.message or message, request_id)
    details = {"address": address, "status": code.name}
    if code is grpc.StatusCode.UNIMPLEMENTED:
        message = f"{address} does not speak legato.v1; is a router there? ({message})"
    elif code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return errors.InvalidParameter(f"request is too large: {message}", request_id=request_id, details=details)
    kind = _BY_STATUS.get(code, errors.InternalError)
    if code is grpc.StatusCode.UNAVAILABLE and SHUT_DOWN in message:
        kind = errors.Draining
    if kind is errors.Draining:
        message = f"the router at {address} stopped"
    elif kind is errors.Unreachable:
        message = f"no router answers at {address}: {message.rpartition(': ')[2].rstrip(']')}"
    elif kind is errors.DeadlineExceeded:
        message = "the request's deadline passed before its answer was whole"
    return kind(message or code.name, request_id=request_id, details=details)


def _from_info(info: error_details_pb2.ErrorInfo, message: str, request_id: str) -> errors.LegatoError:
    details = dict(info.metadata)
    said = details.pop("retryable", None)
    details.pop("fault", None)  # what the class says
    retryable = None if said is None else said.lower() == "true"
    named = details.pop("request_id", "") or request_id
    if info.reason in errors.BY_REASON:
        kind = errors.BY_REASON[info.reason]
        return kind(message, request_id=named, details=details, retryable=retryable)
    known = info.reason in common_pb2.ErrorReason.keys()  # noqa: SIM118 (an enum wrapper, no dict)
    kind = errors.ClusterError if known else errors.InternalError
    return kind(message, request_id=named, details=details, reason=info.reason, retryable=retryable)
