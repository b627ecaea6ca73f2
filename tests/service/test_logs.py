"""One line a record, with the request's and the trace's id."""

from __future__ import annotations

import io
import logging
import re
import sys

from opentelemetry import trace

from service import logs


def formatted(message: str, *arguments: object, exc_info: object = None) -> str:
    record = logging.LogRecord("legato.router.journey", logging.INFO, "", 0, message, arguments, exc_info)  # type: ignore[arg-type]
    return logs.LineFormatter("legato-router").format(record)


def test_a_line_says_when_who_and_which_request() -> None:
    context = trace.SpanContext(0xABC, 0xDEF, is_remote=True)
    span = trace.NonRecordingSpan(context)
    with logs.request_id("r-1"), trace.use_span(span):
        line = formatted("placed %s", "prefill-0")
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info    legato-router router\.journey request=r-1 trace=0{29}abc"
    assert re.fullmatch(pattern + " placed prefill-0", line)
    assert "request=" not in formatted("later")
    assert "trace=" not in formatted("later")


def test_a_message_cannot_forge_a_line() -> None:
    assert formatted("hello\n2026 error forged").count("\n") == 0


def test_a_traceback_follows() -> None:
    try:
        raise ZeroDivisionError("oops")
    except ZeroDivisionError:
        assert "\nTraceback" in formatted("defect", exc_info=sys.exc_info())


def test_only_our_loggers_follow_the_level() -> None:
    root, ours = logging.getLogger(), logging.getLogger("legato")
    before, levels = root.handlers[:], (root.level, ours.level)
    try:
        logs.setup("legato-test", "debug")
        handler = root.handlers[0]
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(stream := io.StringIO())
        logs.get("here").debug("seen")
        logging.getLogger("somebody").info("unseen")
        assert stream.getvalue().endswith("legato-test here seen\n")
        assert stream.getvalue().count("\n") == 1
    finally:
        root.handlers[:] = before
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
