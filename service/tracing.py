"""Spans of one process, and the W3C trace context (https://www.w3.org/TR/trace-context/) on gRPC metadata."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from spec.errors import LegatoError
from telemetry import names
from telemetry.setup import Telemetry

_W3C = TraceContextTextMapPropagator()
_HEADERS = frozenset(_W3C.fields)

Value = str | int | float | bool


class Spans:
    """Opens spans; where telemetry is off it still passes a caller's trace context on, and records nothing."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    @contextlib.contextmanager
    def span(
        self,
        name: str,
        attributes: Mapping[str, Value] | None = None,
        *,
        kind: trace.SpanKind = trace.SpanKind.INTERNAL,
        start_ns: int | None = None,
    ) -> Iterator[trace.Span]:
        """Current for what runs inside. An exception marks the span with its reason; `start_ns` is unix time."""
        assert name in names.SPANS, f"{name} is not declared in telemetry/names.py"
        if not self._telemetry.enabled:
            yield trace.get_current_span()
            return
        with self._telemetry.tracer.start_as_current_span(
            name, kind=kind, attributes=attributes, start_time=start_ns, record_exception=False
        ) as span:
            try:
                yield span
            except BaseException as error:
                reason = error.reason if isinstance(error, LegatoError) else type(error).__name__
                span.set_attribute(names.ERROR_REASON, reason)
                raise

    def record(
        self,
        name: str,
        start_ns: int,
        end_ns: int,
        attributes: Mapping[str, Value] | None = None,
        context: Context | None = None,
    ) -> Context | None:
        """A span that has been: from stage times, unix nanoseconds; a stage that was not passed (0) leaves none.

        Its parent is the current span, or that of `context`; what is returned makes it a parent itself.
        """
        assert name in names.SPANS, f"{name} is not declared in telemetry/names.py"
        if not self._telemetry.enabled or not start_ns or not end_ns:
            return context
        span = self._telemetry.tracer.start_span(name, context, attributes=attributes, start_time=start_ns)
        span.end(max(start_ns, end_ns))
        return trace.set_span_in_context(span, context)


def extract(metadata: Iterable[tuple[str, str | bytes]]) -> Context | None:
    """The caller's trace context; None where there is none. One that does not parse is an empty context."""
    carrier = {key: value for key, value in metadata if key in _HEADERS and isinstance(value, str)}
    if not carrier:
        return None
    return _W3C.extract(carrier, Context())


def inject() -> list[tuple[str, str]]:
    """gRPC metadata with the current trace context; empty where there is none."""
    if not trace.get_current_span().get_span_context().is_valid:
        return []
    carrier: dict[str, str] = {}
    _W3C.inject(carrier)
    return list(carrier.items())


def now_ns() -> int:
    """Unix nanoseconds, as spans and StageTimes count."""
    return time.time_ns()
