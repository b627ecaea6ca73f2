"""Spans and metrics as they arrive at a real OTLP receiver in another process; and that nothing happens without one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from telemetry import names
from telemetry.setup import setup

ROOT = Path(__file__).resolve().parents[2]


def test_names_are_declared_once_and_in_our_own_space() -> None:
    assert len(names.SPANS) == sum(name.startswith("SPAN_") for name in vars(names))
    assert all(name.startswith("legato.") for name in names.SPANS)
    assert len({metric.name for metric in names.METRICS}) == len(names.METRICS)
    assert all(metric.name.startswith("legato.") for metric in names.METRICS)
    in_seconds = {metric.bounds for metric in names.HISTOGRAMS if metric.unit == "s"}
    assert in_seconds == {names.SECONDS, names.LATENCIES}
    assert all(list(metric.bounds) == sorted(set(metric.bounds)) for metric in names.HISTOGRAMS)
    assert names.__doc__ is not None
    drawn = {word for line in names.__doc__.splitlines() for word in line.split() if word.startswith("legato.")}
    assert drawn == names.SPANS, "the tree at the top of the file is the truth"


def test_what_is_recorded_arrives(otlp_receiver: Any) -> None:
    telemetry = setup("legato-test", otlp_receiver.endpoint, instance_id="test-0")
    assert telemetry.enabled
    with telemetry.tracer.start_as_current_span(names.SPAN_REQUEST):
        telemetry.tracer.start_span(names.SPAN_ROUTE, start_time=1_000_000_000).end(1_500_000_000)
    telemetry.histograms[names.TTFT.name].record(0.25)
    telemetry.histograms[names.TTFT.name].record(0.5)
    telemetry.counters[names.REQUESTS.name].add(3, {"reason": "stop"})
    telemetry.close()
    got = otlp_receiver.arrived()
    spans = {item["name"]: item for item in got if item["kind"] == "span"}
    metrics = {item["name"]: item for item in got if item["kind"] == "metric"}
    assert set(spans) == {names.SPAN_REQUEST, names.SPAN_ROUTE}
    assert {span["service"] for span in spans.values()} == {"legato-test"}
    route, request = spans[names.SPAN_ROUTE], spans[names.SPAN_REQUEST]
    assert (route["start"], route["end"]) == (1_000_000_000, 1_500_000_000)
    assert (route["trace"], route["parent"]) == (request["trace"], request["span"])
    ttft = metrics[names.TTFT.name]
    assert (ttft["value"], ttft["unit"], ttft["bounds"]) == (0.75, "s", list(names.SECONDS))
    assert metrics[names.REQUESTS.name]["value"] == 3


@pytest.mark.timeout(30)
def test_a_receiver_that_is_not_there_does_not_hold_the_process() -> None:
    telemetry = setup("legato-test", "http://127.0.0.1:1")
    with telemetry.tracer.start_as_current_span(names.SPAN_REQUEST):
        telemetry.counters[names.REQUESTS.name].add(1)
    telemetry.close()


def test_without_an_endpoint_the_sdk_is_not_even_loaded() -> None:
    code = (
        "import sys, threading\nfrom telemetry.setup import setup\nfrom telemetry import names\n"
        "telemetry = setup('legato-test')\n"
        "with telemetry.tracer.start_as_current_span(names.SPAN_REQUEST) as span: assert not span.is_recording()\n"
        "telemetry.histograms[names.TTFT.name].record(1.0)\ntelemetry.close()\n"
        "assert not telemetry.enabled\nassert threading.active_count() == 1\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exp', 'grpc'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
