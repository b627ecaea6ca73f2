"""What a request can end with instead of an answer. Loads nothing but the standard library.

    LegatoError                     message, reason, retryable, request_id, details, answer
    ├── RequestError                the caller's fault; sending the same again cannot help
    │   ├── InvalidParameter        a field is out of its range, and is named: details["field"]
    │   │   └── ContextTooLong      the prompt leaves no room in the context for an answer's first token
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from legato.types import Answer

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


MAX_SHOWN_CHARACTERS = 128  # of a request's name, which is the caller's own


class LegatoError(Exception):
    """Base of all.

    reason      the name on the wire
    retryable   whether sending the same again can help
    details     the figures of the message (the field, the limit, ...) as strings. Of a request that was sent several
                times: "first_reason", which the error's __cause__ is of; of one with an answer: "tokens" that had come
    answer      what had come of the answer; None for what has none, or never was sent
    """

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
        self.answer: Answer | None = None
        if reason is not None:
            self.reason = reason
        if retryable is not None:
            self.retryable = retryable

    def __str__(self) -> str:
        if not self.request_id:
            return self.message
        name = self.request_id
        if len(name) > MAX_SHOWN_CHARACTERS:
            name = f"{name[:MAX_SHOWN_CHARACTERS]}..."
        return f"{self.message} (request {name if name.isprintable() else repr(name)})"


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
