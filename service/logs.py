"""Short structured lines on standard error:

    2026-11-24T05:52:10.123Z info  legato-router router.journey request=9f3a trace=4bf92f35 placed prefill=prefill-0

A request's id is set once (`with request_id("9f3a"):`) and is on every line below it; the trace's id is the span's.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import sys
import time
from collections.abc import Iterator

from opentelemetry import trace

_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("legato_request_id", default="")


def get(name: str) -> logging.Logger:
    return logging.getLogger(f"legato.{name}")


def setup(service_name: str, level: str) -> None:
    """Once, at start. Only our own loggers are as talkative as `level`; the libraries' speak from warning on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(service_name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("legato").setLevel(level.upper())


@contextlib.contextmanager
def request_id(value: str) -> Iterator[None]:
    token = _request_id.set(value)
    try:
        yield
    finally:
        _request_id.reset(token)


class LineFormatter(logging.Formatter):
    """One line a record (a traceback follows it); a line break in a message is shown as \\n."""

    def __init__(self, service_name: str) -> None:
        super().__init__()
        self._service_name = service_name

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        words = [f"{seconds}.{int(record.msecs):03d}Z", f"{record.levelname.lower():<7}", self._service_name]
        words.append(record.name.removeprefix("legato."))
        if request := _request_id.get():
            words.append(f"request={request}")
        span = trace.get_current_span().get_span_context()
        if span.is_valid:
            words.append(f"trace={span.trace_id:032x}")
        words.append(record.getMessage().replace("\n", "\\n"))
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
