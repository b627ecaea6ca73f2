"""Errors on the wire: a gRPC status and a google.rpc.ErrorInfo (domain "legato"). One table, both ways.

ErrorInfo.reason     a name of legato.v1.ErrorReason, = `reason` of the class in spec/errors.py
ErrorInfo.metadata   the error's details, and: retryable "true"/"false", fault "client"/"cluster"/"operator"
"""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from legato.v1 import common_pb2
from spec import errors
from spec.errors import BY_REASON, LegatoError

DOMAIN = "legato"
CODES: dict[type[LegatoError], grpc.StatusCode] = {
    errors.InvalidParameter: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ContextTooLong: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownModel: grpc.StatusCode.NOT_FOUND,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.RequestCancelled: grpc.StatusCode.CANCELLED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.OutOfBlocks: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.WorkerLost: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.NoWorkers: grpc.StatusCode.UNAVAILABLE,
    errors.InternalError: grpc.StatusCode.INTERNAL,
    errors.TicketRefused: grpc.StatusCode.PERMISSION_DENIED,
    errors.WireMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DigestMismatch: grpc.StatusCode.DATA_LOSS,
    errors.TransferFailed: grpc.StatusCode.ABORTED,
    errors.TransportUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidModel: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UnsupportedModel: grpc.StatusCode.FAILED_PRECONDITION,
    errors.InvalidConfiguration: grpc.StatusCode.FAILED_PRECONDITION,
}
# What a status without our ErrorInfo means: gRPC itself, a proxy or the kernel sent it.
FOREIGN: dict[grpc.StatusCode, type[LegatoError]] = {
    grpc.StatusCode.UNAVAILABLE: errors.WorkerLost,
    grpc.StatusCode.UNIMPLEMENTED: errors.WorkerLost,  # another process has its address, or one that still loads
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.RequestCancelled,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidParameter,
}
# Trailers travel in one HTTP/2 header block, of which a peer takes 8 KiB by default.
MAX_MESSAGE_CHARACTERS = 1500
MAX_DETAIL_CHARACTERS = 200
MAX_DETAILS = 12
DETAILS_KEY = "grpc-status-details-bin"


def code_of(error: LegatoError) -> grpc.StatusCode:
    """The nearest row up the tree."""
    return next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), grpc.StatusCode.INTERNAL)


def fault_of(error: LegatoError) -> str:
    """Whose it is: "client", "operator" (what was found at start) or "cluster" (ours, hand-overs included)."""
    if isinstance(error, errors.RequestError):
        return "client"
    return "operator" if isinstance(error, errors.SetupError) else "cluster"


def status_of(error: LegatoError) -> status_pb2.Status:
    details = list(error.details.items())[:MAX_DETAILS]
    metadata = {_clip(key, 64): _clip(value, MAX_DETAIL_CHARACTERS) for key, value in details}
    metadata |= {"retryable": str(error.retryable).lower(), "fault": fault_of(error)}
    status = status_pb2.Status(code=code_of(error).value[0], message=_clip(error.message, MAX_MESSAGE_CHARACTERS))
    status.details.add().Pack(
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata),
    )
    return status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: LegatoError) -> NoReturn:
    """Ends the call with the error's status. Does not return."""
    status = status_of(error)
    trailers = ((DETAILS_KEY, status.SerializeToString()),)
    await context.abort(code_of(error), status.message, trailers)
    raise AssertionError("abort() returned")


def error_from_rpc(rpc_error: grpc.RpcError) -> LegatoError:
    """The error that a call ended with. Without our ErrorInfo the code decides, and unknown ones are InternalError."""
    code, message = rpc_error.code(), rpc_error.details() or ""
    for key, value in rpc_error.trailing_metadata() or ():
        if key == DETAILS_KEY:
            error = _from_status(value)
            if error is not None:
                return error
    kind = FOREIGN.get(code, errors.InternalError)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        kind = errors.InvalidParameter  # the same message will be as large the next time
    return _make(kind, message or code.name, {"code": code.name})


def reason_to_proto(error: LegatoError) -> common_pb2.ErrorReason:
    """For errors inside messages (SequenceOutput.error, HandoffReply.Cancel.reason)."""
    reason: common_pb2.ErrorReason = getattr(common_pb2, error.reason)
    return reason


def error_from_reason(reason: common_pb2.ErrorReason, message: str) -> LegatoError:
    """What reason_to_proto() wrote; a reason of a newer version is InternalError."""
    name = common_pb2.ErrorReason.Name(reason) if reason in common_pb2.ErrorReason.values() else ""
    return _make(BY_REASON.get(name, errors.InternalError), message, {})


def _from_status(serialized: bytes) -> LegatoError | None:
    try:
        status = status_pb2.Status.FromString(serialized)
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info) and info.domain == DOMAIN:
                details = {key: value for key, value in info.metadata.items() if key not in ("retryable", "fault")}
                return _make(BY_REASON.get(info.reason, errors.InternalError), status.message, details)
    except DecodeError:
        return None
    return None


def _make(kind: type[LegatoError], message: str, details: dict[str, str]) -> LegatoError:
    """With the message as it came: InvalidParameter() would put its field in front of it once more."""
    error = kind.__new__(kind)
    LegatoError.__init__(error, message, **details)
    return error


def _clip(text: str, limit: int) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text on the wire
    return text if len(text) <= limit else text[: limit - 1] + "…"
