"""What a request can end with instead of an answer. Loads nothing but the standard library.

    LegatoError                     message, reason, retryable, request_id, details
    ├── RequestError                the caller's fault; sending the same again cannot help
    │   ├── InvalidParameter        a field is out of its range, and is named: details["field"]
    │   │   └── ContextTooLong      prompt + max_tokens exceed what the model or the cluster holds
    │   ├── UnknownModel
    │   ├── Unauthenticated
    │   └── RequestCancelled        the caller left
    └── ClusterError                the cluster's; a retry can help, and the client has tried where that was safe
        ├── DeadlineExceeded        the request's own deadline passed
        ├── Overloaded              the waiting line is full
        ├── OutOfBlocks             no KV memory now
        ├── WorkerLost              the worker that ran it is gone
        ├── Draining                the cluster admits nothing new
        ├── NoWorkers               a pool is empty
        ├── Unreachable             no router answers at the addresses given (found by the client, not on the wire)
        └── InternalError           a defect; a retry does not help

On the wire an error is a gRPC status with a google.rpc.ErrorInfo (domain "legato"), whose reason is `reason` here.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "ClusterError",
    "ContextTooLong",
    "DeadlineExceeded",
    "Draining",
    "InternalError",
    "InvalidParameter",
    "LegatoError",
    "NoWorkers",
    "OutOfBlocks",
    "Overloaded",
    "RequestCancelled",
    "RequestError",
    "Unauthenticated",
    "UnknownModel",
    "Unreachable",
    "WorkerLost",
]


class LegatoError(Exception):
    """Base of all. `reason` is the name on the wire; `retryable` says whether sending the same again can help;
    `details` are the figures of the message (the field, the limit, ...) as strings."""

    reason = "INTERNAL"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        request_id: str = "",
        details: Mapping[str, str] | None = None,
        reason: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.details = dict(details or {})
        if reason is not None:
            self.reason = reason
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        return f"{self.message} (request {self.request_id})" if self.request_id else self.message


class RequestError(LegatoError):
    reason = "INVALID_PARAMETER"


class InvalidParameter(RequestError):
    reason = "INVALID_PARAMETER"


class ContextTooLong(InvalidParameter):
    reason = "CONTEXT_TOO_LONG"


class UnknownModel(RequestError):
    reason = "UNKNOWN_MODEL"


class Unauthenticated(RequestError):
    reason = "UNAUTHENTICATED"


class RequestCancelled(RequestError):
    reason = "CANCELLED"


class ClusterError(LegatoError):
    retryable = True


class DeadlineExceeded(ClusterError):
    reason = "DEADLINE_EXCEEDED"


class Overloaded(ClusterError):
    reason = "OVERLOADED"


class OutOfBlocks(ClusterError):
    reason = "OUT_OF_BLOCKS"


class WorkerLost(ClusterError):
    reason = "WORKER_LOST"


class Draining(ClusterError):
    reason = "DRAINING"


class NoWorkers(ClusterError):
    reason = "NO_WORKERS"


class Unreachable(ClusterError):
    reason = "UNREACHABLE"


class InternalError(ClusterError):
    reason = "INTERNAL"
    retryable = False


BY_REASON: dict[str, type[LegatoError]] = {
    error.reason: error
    for error in (
        *(InvalidParameter, ContextTooLong, UnknownModel, Unauthenticated, RequestCancelled),
        *(DeadlineExceeded, Overloaded, OutOfBlocks, WorkerLost, Draining, NoWorkers, InternalError),
    )
}
