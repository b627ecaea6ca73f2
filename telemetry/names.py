"""Every span and every metric, declared once. One trace per request; never a span per token.

legato.client                        the SDK, from sending to the last token
└── legato.request                   the router
    ├── legato.route                 tokenise, place, wait for room, reserve
    ├── legato.prefill               one Prefill call of the prefill worker
    │   ├── legato.prefill.queue     in its line
    │   ├── legato.prefill.compute   its steps, up to the first token
    │   └── legato.transfer          from the first write to the last acknowledgement
    │       └── legato.handoff.finish    what the first token did not wait for
    ├── legato.move                  from one decode worker to another, while it runs: what the first does
    └── legato.decode                from admission to the last token there
        ├── legato.decode.queue      blocks landed, waiting for a step
        └── legato.decode.first_step
"""

from __future__ import annotations

import dataclasses

SPAN_CLIENT = "legato.client"
SPAN_REQUEST = "legato.request"
SPAN_ROUTE = "legato.route"
SPAN_PREFILL = "legato.prefill"
SPAN_PREFILL_QUEUE = "legato.prefill.queue"
SPAN_PREFILL_COMPUTE = "legato.prefill.compute"
SPAN_TRANSFER = "legato.transfer"
SPAN_HANDOFF_FINISH = "legato.handoff.finish"
SPAN_MOVE = "legato.move"
SPAN_DECODE = "legato.decode"
SPAN_DECODE_QUEUE = "legato.decode.queue"
SPAN_DECODE_FIRST_STEP = "legato.decode.first_step"
SPANS = frozenset(value for name, value in list(globals().items()) if name.startswith("SPAN_"))

# Attributes of spans.
REQUEST_ID = "legato.request_id"
SEQUENCE_ID = "legato.sequence_id"
WORKER_ID = "legato.worker_id"
OUTPUT_TOKENS = "legato.output_tokens"
CACHED_TOKENS = "legato.cached_tokens"
TRANSFER_BYTES = "legato.transfer_bytes"
ATTEMPT = "legato.attempt"
ERROR_REASON = "legato.error_reason"


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """`bounds` are the upper bounds of a histogram's buckets; a counter has none."""

    name: str
    unit: str
    description: str
    bounds: tuple[float, ...] = ()


# 1 ms to 60 s in steps of about 1.8: the library's own bounds are meant for milliseconds.
SECONDS = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    1.0,
    2.0,
    3.0,
    5.0,
    10.0,
    20.0,
    30.0,
    60.0,
)

RATES = tuple(10.0**exponent * step for exponent in range(6, 12) for step in (1, 2, 5))  # 1 MB/s to 500 GB/s
LATENCIES = tuple(10.0**exponent * step for exponent in range(-6, 1) for step in (1, 2, 5))  # 1 us to 5 s

TTFT = Metric("legato.ttft", "s", "time to first token, as the router saw it", SECONDS)
ITL = Metric("legato.itl", "s", "time between two tokens of one answer, as the router saw it", SECONDS)
REQUEST_DURATION = Metric("legato.request.duration", "s", "whole request, as the router saw it", SECONDS)
STEP_DURATION = Metric("legato.step.duration", "s", "one step of a worker's engine", SECONDS)
TRANSFER_DURATION = Metric("legato.transfer.duration", "s", "one hand-over's time with a write in flight", SECONDS)
REQUESTS = Metric("legato.requests", "{request}", "requests that ended, by reason")
TOKENS_COMPUTED = Metric("legato.tokens.computed", "{token}", "tokens whose KV was computed")
TOKENS_GENERATED = Metric("legato.tokens.generated", "{token}", "tokens drawn")
TOKENS_PROPOSED = Metric("legato.tokens.proposed", "{token}", "guesses that speculation made")
TOKENS_ACCEPTED = Metric("legato.tokens.accepted", "{token}", "guesses that were right")
STAGE_BUSY = Metric("legato.stage.busy", "s", "time in which a pipeline stage computed, by stage")
STAGE_IDLE = Metric("legato.stage.idle", "s", "time in which it waited while steps were out: its bubble, by stage")
TRANSFER_BYTES_TOTAL = Metric("legato.transfer.bytes", "By", "KV bytes handed over")
LINK_RATE = Metric("legato.link.rate", "By/s", "what a link to another worker moved when the two met", RATES)
LINK_LATENCY = Metric("legato.link.latency", "s", "what a write of one byte took then", LATENCIES)
HANDOFFS_REFUSED = Metric("legato.handoffs.refused", "{handoff}", "hand-overs refused, by reason")
QUARANTINE_DURATION = Metric(
    "legato.quarantine.duration",
    "s",
    "how long memory of a broken hand-over was out of use, by proof: word, cut",
    SECONDS,
)
MOVES = Metric("legato.moves", "{sequence}", "moves to another decode worker, by why they stayed; OK: they went")
PREEMPTIONS = Metric("legato.preemptions", "{sequence}", "sequences that gave their blocks up")
GRAPHS_REFUSED = Metric(
    "legato.cuda_graphs.refused",
    "{worker}",
    "workers whose GPU could not capture decode steps: they are launched singly",
)
TOKENS_FETCHED = Metric("legato.tokens.fetched", "{token}", "tokens whose KV was fetched from another worker")
TIER_BYTES = Metric("legato.tier.bytes", "By", "KV bytes stored in tiers, and loaded from them")
TIER_HITS = Metric("legato.tier.hits", "{block}", "KV blocks brought back from a tier, by tier")
EXPERT_IMBALANCE = Metric(
    "legato.expert.imbalance",
    "1",
    "load of the busiest part of the experts by the mean one's, before and after they were placed by it",
    (1.05, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 8.0),
)
METRICS = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
HISTOGRAMS = tuple(metric for metric in METRICS if metric.bounds)
COUNTERS = tuple(metric for metric in METRICS if not metric.bounds)
