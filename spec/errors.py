"""Every failure that an input, a peer or a device can cause. `assert` is for our own invariants only.

    LegatoError
    ├── RequestError                the client's fault; sending the same again cannot help
    │   ├── InvalidParameter        a field is out of its range, and is named
    │   │   └── ContextTooLong      the prompt leaves no room in the context for an answer's first token
    │   ├── UnknownModel
    │   ├── Unauthenticated
    │   └── RequestCancelled        the client left
    ├── ClusterError                ours; a retry can help
    │   ├── DeadlineExceeded        the request's own deadline passed
    │   ├── Overloaded              the waiting line is full
    │   ├── OutOfBlocks             no KV memory now
    │   ├── WorkerLost              the worker that ran it is gone
    │   ├── Draining                the worker admits nothing new
    │   ├── NoWorkers               a pool is empty
    │   └── InternalError           a defect
    ├── HandoffError                between workers; the request is computed again elsewhere
    │   ├── TicketRefused           forged, replayed, expired, other revision, stale generation, unknown reservation
    │   ├── WireMismatch            two workers speak no version of the wire in common
    │   ├── DigestMismatch          the blocks that landed are not those that were computed
    │   └── TransferFailed          the link broke, the peer died, a piece is missing
    └── SetupError                  the operator's; found at start, never inside a request
        ├── InvalidModel            a file is missing, cut short, of the wrong shape
        ├── UnsupportedModel        a family, tensor type or option that no table row knows
        ├── InvalidConfiguration    unknown key, value out of range
        └── TransportUnavailable    says what is missing on this machine

On the wire an error is a gRPC status and a google.rpc.ErrorInfo with `reason`; service/status.py holds that table.
"""

from __future__ import annotations


class LegatoError(Exception):
    """Base of all. `reason` is the name on the wire, `retryable` says whether sending the same again can help."""

    reason = "INTERNAL"
    retryable = False

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details: dict[str, str] = {key: str(value) for key, value in details.items()}


class RequestError(LegatoError):
    reason = "INVALID_PARAMETER"


class InvalidParameter(RequestError):
    """`InvalidParameter("must be at least 1, is 0", field="n")` reads "n must be at least 1, is 0"."""

    reason = "INVALID_PARAMETER"

    def __init__(self, message: str, *, field: str, **details: object) -> None:
        super().__init__(f"{field} {message}", field=field, **details)


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


class InternalError(ClusterError):
    reason = "INTERNAL"
    retryable = False


class HandoffError(LegatoError):
    reason = "TRANSFER_FAILED"
    retryable = True


class TicketRefused(HandoffError):
    reason = "TICKET_REFUSED"


class WireMismatch(HandoffError):
    reason = "WIRE_MISMATCH"


class DigestMismatch(HandoffError):
    reason = "DIGEST_MISMATCH"


class TransferFailed(HandoffError):
    reason = "TRANSFER_FAILED"


class SetupError(LegatoError):
    reason = "INVALID_CONFIGURATION"


class InvalidModel(SetupError):
    reason = "INVALID_MODEL"


class UnsupportedModel(SetupError):
    reason = "UNSUPPORTED_MODEL"


class InvalidConfiguration(SetupError):
    reason = "INVALID_CONFIGURATION"


class TransportUnavailable(SetupError):
    reason = "TRANSPORT_UNAVAILABLE"


def _leaves(base: type[LegatoError]) -> dict[str, type[LegatoError]]:
    found: dict[str, type[LegatoError]] = {}
    for child in base.__subclasses__():
        found.update(_leaves(child))
        if "reason" in vars(child) and child not in (RequestError, HandoffError, SetupError):
            found[child.reason] = child
    return found


BY_REASON: dict[str, type[LegatoError]] = _leaves(LegatoError)
