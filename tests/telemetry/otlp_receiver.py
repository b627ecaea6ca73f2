"""An OTLP receiver as a process: prints its port, then one JSON line for each span and each histogram that arrives."""

from __future__ import annotations

import json
import sys
from concurrent import futures

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


def tell(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


class Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def Export(self, request, context):  # type: ignore[no-untyped-def]
        for resource in request.resource_spans:
            service = {item.key: item.value.string_value for item in resource.resource.attributes}["service.name"]
            for scope in resource.scope_spans:
                for span in scope.spans:
                    tell(
                        kind="span",
                        service=service,
                        name=span.name,
                        trace=span.trace_id.hex(),
                        span=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        start=span.start_time_unix_nano,
                        end=span.end_time_unix_nano,
                        attributes={item.key: item.value.string_value for item in span.attributes},
                    )
        return trace_service_pb2.ExportTraceServiceResponse()


class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def Export(self, request, context):  # type: ignore[no-untyped-def]
        for resource in request.resource_metrics:
            for scope in resource.scope_metrics:
                for metric in scope.metrics:
                    for point in [*metric.histogram.data_points, *metric.sum.data_points]:
                        bounds = list(getattr(point, "explicit_bounds", ()))
                        value = point.sum if bounds else point.as_int
                        tell(kind="metric", name=metric.name, unit=metric.unit, value=value, bounds=bounds)
        return metrics_service_pb2.ExportMetricsServiceResponse()


def main() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))  # one writer, so that lines of two exports do not mix
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Traces(), server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(Metrics(), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()  # until the test closes it
    server.stop(None)


if __name__ == "__main__":
    main()
