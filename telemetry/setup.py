"""Traces and metrics leave a process only where an OTLP endpoint is configured; otherwise nothing is recorded.

Without an endpoint the tracer and the instruments are the API's own no-operation ones: no thread, no SDK import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from opentelemetry import metrics, trace
from opentelemetry.metrics import NoOpMeter

from telemetry import names


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """One per process; `close()` sends what is still waiting. `enabled` is False without an endpoint."""

    tracer: trace.Tracer
    histograms: Mapping[str, metrics.Histogram]  # by name: telemetry.histograms[names.TTFT.name].record(0.2)
    counters: Mapping[str, metrics.Counter]
    enabled: bool
    close: Callable[[], None]


def setup(
    service_name: str, otlp_endpoint: str | None = None, instance_id: str = "", export_interval_s: float = 10.0
) -> Telemetry:
    """`otlp_endpoint` is "http://host:port" of an OTLP gRPC receiver; https is encrypted."""
    if otlp_endpoint is None:
        return _telemetry(trace.NoOpTracer(), NoOpMeter("legato"), enabled=False, close=lambda: None)
    return _exporting(service_name, otlp_endpoint, instance_id, export_interval_s)


def _exporting(service_name: str, otlp_endpoint: str, instance_id: str, export_interval_s: float) -> Telemetry:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
    from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    attributes = {"service.name": service_name, "service.namespace": "legato"}
    resource = Resource.create(attributes | ({"service.instance.id": instance_id} if instance_id else {}))
    insecure = not otlp_endpoint.startswith("https://")
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(endpoint=otlp_endpoint, insecure=insecure, timeout=2), schedule_delay_millis=500
        )
    )
    reader = PeriodicExportingMetricReader(
        OTLPMetricExporter(endpoint=otlp_endpoint, insecure=insecure, timeout=2),
        export_interval_millis=export_interval_s * 1000,
    )
    views = [
        View(instrument_name=metric.name, aggregation=ExplicitBucketHistogramAggregation(metric.bounds))
        for metric in names.HISTOGRAMS
    ]
    meters = MeterProvider([reader], resource, views=views)

    def close() -> None:
        tracers.shutdown()
        meters.shutdown(timeout_millis=2000)

    return _telemetry(tracers.get_tracer("legato"), meters.get_meter("legato"), enabled=True, close=close)


def _telemetry(tracer: trace.Tracer, meter: metrics.Meter, *, enabled: bool, close: Callable[[], None]) -> Telemetry:
    histograms = {
        metric.name: meter.create_histogram(metric.name, metric.unit, metric.description) for metric in names.HISTOGRAMS
    }
    counters = {
        metric.name: meter.create_counter(metric.name, metric.unit, metric.description) for metric in names.COUNTERS
    }
    return Telemetry(tracer, MappingProxyType(histograms), MappingProxyType(counters), enabled, close)
