"""A client program whose own OpenTelemetry SDK is set up: asks once, prints the answer as one JSON line.

python traced_client.py ADDRESS OTLP_ENDPOINT PROMPT MAX_TOKENS
"""

from __future__ import annotations

import json
import sys

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

import legato


def main(address: str, otlp_endpoint: str, prompt: str, max_tokens: str) -> None:
    provider = TracerProvider(resource=Resource.create({"service.name": "program"}))
    provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(endpoint=otlp_endpoint, insecure=True)))
    trace.set_tracer_provider(provider)
    with legato.Client(address) as client:
        prompt_ids = list(client.tokenize(prompt))
        answer = client.generate(prompt, max_tokens=int(max_tokens), temperature=0.0, ignore_eos=True)
    provider.shutdown()
    route = answer.route
    told = {
        "prompt_ids": prompt_ids,
        "token_ids": list(answer.token_ids),
        "prefill": route.prefill_worker_id,
        "decode": route.decode_worker_id,
        "transport": route.transfer.transport,
        "sent_tokens": route.transfer.sent_tokens,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
