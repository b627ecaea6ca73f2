"""The error table against spec/errors.py and the wire's ErrorReason, and through a real call."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from legato.v1 import common_pb2
from service import status
from spec import errors

EVERY_CLASS = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LegatoError)
]
LEAVES = [kind for kind in EVERY_CLASS if kind in errors.BY_REASON.values()]


def make(kind: type[errors.LegatoError]) -> errors.LegatoError:
    if issubclass(kind, errors.InvalidParameter):
        return kind("must be at least 1, is 0", field="max_tokens")
    return kind("what happened", worker_id="decode-0")


class Call(grpc.RpcError):
    """A call that ended, as grpc hands it out."""

    def __init__(self, code: grpc.StatusCode, details: str, trailers: tuple[tuple[str, bytes], ...] = ()) -> None:
        self._code, self._details, self._trailers = code, details, trailers

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> tuple[tuple[str, bytes], ...]:
        return self._trailers


def call_with(error: errors.LegatoError) -> Call:
    sent = status.status_of(error)
    return Call(status.code_of(error), sent.message, ((status.DETAILS_KEY, sent.SerializeToString()),))


def test_reasons_and_error_classes_are_one_list() -> None:
    names = set(common_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}
    assert names == set(errors.BY_REASON)
    assert set(status.CODES) == set(errors.BY_REASON.values())
    assert {kind.reason for kind in EVERY_CLASS} <= names


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_an_error_survives_the_wire(kind: type[errors.LegatoError]) -> None:
    sent = make(kind)
    got = status.error_from_rpc(call_with(sent))
    assert type(got) is kind
    assert (got.message, got.details, got.retryable, got.reason) == (
        sent.message,
        sent.details,
        sent.retryable,
        sent.reason,
    )
    again = status.error_from_reason(status.reason_to_proto(sent), sent.message)
    assert type(again) is kind


@pytest.mark.parametrize("kind", EVERY_CLASS, ids=lambda kind: kind.__name__)
def test_every_class_has_a_status_that_google_rpc_readers_understand(kind: type[errors.LegatoError]) -> None:
    read = status_pb2.Status.FromString(status.status_of(make(kind)).SerializeToString())
    info = error_details_pb2.ErrorInfo()
    assert read.details[0].Unpack(info)
    assert info.domain == "legato"
    assert info.reason in errors.BY_REASON
    assert info.metadata["retryable"] in ("true", "false")
    assert info.metadata["fault"] in ("client", "cluster", "operator")
    assert read.code != 0


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, "connection reset", errors.WorkerLost),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", errors.DeadlineExceeded),
        (grpc.StatusCode.CANCELLED, "", errors.RequestCancelled),
        (grpc.StatusCode.UNKNOWN, "boom", errors.InternalError),
        (grpc.StatusCode.UNIMPLEMENTED, "no such method", errors.WorkerLost),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", errors.Overloaded),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (5 vs. 4)", errors.InvalidParameter),
    ],
)
def test_a_status_that_is_not_ours_goes_by_its_code(
    code: grpc.StatusCode, message: str, kind: type[errors.LegatoError]
) -> None:
    assert type(status.error_from_rpc(Call(code, message))) is kind
    garbage = ((status.DETAILS_KEY, b"\xff\xff\xff"),)
    assert type(status.error_from_rpc(Call(code, message, garbage))) is kind


def test_a_reason_of_a_newer_version_is_an_internal_error() -> None:
    assert type(status.error_from_reason(4711, "from the future")) is errors.InternalError  # type: ignore[arg-type]


def test_large_and_unpaired_text_fits_into_the_trailers() -> None:
    error = errors.WorkerLost("x" * 1_000_000 + "\ud800", **{f"detail_{i}": "é" * 10_000 for i in range(50)})
    assert len(status.status_of(error).SerializeToString()) < 8192
    assert "?" in status.status_of(errors.WorkerLost("lone \ud800")).message
