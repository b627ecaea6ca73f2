"""What a worker has done, as metrics; where none are exported this costs next to nothing."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.probing import Measured
from legato.v1.common_pb2 import TransferStats
from scheduler.plan import StepPlan, StepResult
from spec.errors import LegatoError
from telemetry import names
from telemetry.setup import Telemetry

RECENT = 0.9  # of what steps took counts so much after the next one


class Meter:
    """`step` is called by the engine loop's thread, `tier_hit` and `tier_bytes` also by threads that copy, the others
    by the event loop."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.refused_handoffs = 0
        self.moved_sequences = 0
        self.fetched_tokens = 0  # of prefixes, from other workers
        self.seconds_per_token: float | None = None  # of computing, over the last steps; None: there was none
        self._recent = (0.0, 0.0)  # seconds and tokens, the older the less
        self._histograms = telemetry.histograms
        self._counters = telemetry.counters

    def step(self, plans: Sequence[StepPlan], results: Sequence[StepResult], duration_s: float) -> None:
        self._histograms[names.STEP_DURATION.name].record(duration_s)
        num_tokens = sum(plan.num_tokens for plan in plans)
        self._counters[names.TOKENS_COMPUTED.name].add(num_tokens)
        seconds, tokens = (
            RECENT * before + now for before, now in zip(self._recent, (duration_s, num_tokens), strict=True)
        )
        self._recent, self.seconds_per_token = (seconds, tokens), seconds / tokens if tokens else None
        outcomes = [
            (piece.num_guesses, len(drawn))
            for plan, result in zip(plans, results, strict=True)
            for piece, drawn in zip(plan.slices, result.drawn, strict=True)
        ]
        self._counters[names.TOKENS_GENERATED.name].add(sum(num_drawn for _, num_drawn in outcomes))
        if proposed := sum(num_guesses for num_guesses, _ in outcomes):
            accepted = sum(num_drawn - 1 for num_guesses, num_drawn in outcomes if num_guesses)
            self._counters[names.TOKENS_PROPOSED.name].add(proposed)
            self._counters[names.TOKENS_ACCEPTED.name].add(accepted)

    def experts_placed(self, before: float, after: float) -> None:
        """What the busiest part computes by the mean, of the load that was measured."""
        for placed, found in (("before", before), ("after", after)):
            self._histograms[names.EXPERT_IMBALANCE.name].record(found, {"placed": placed})

    def graphs_refused(self) -> None:
        self._counters[names.GRAPHS_REFUSED.name].add(1)

    def preempted(self) -> None:
        self._counters[names.PREEMPTIONS.name].add(1)

    def handed_over(self, stats: TransferStats) -> None:
        """As its sender counted it."""
        self._histograms[names.TRANSFER_DURATION.name].record(stats.moving_s, {"transport": stats.transport})
        self._counters[names.TRANSFER_BYTES_TOTAL.name].add(stats.bytes, {"transport": stats.transport})

    def met(self, transport: str, runs_over: str, measured: Measured) -> None:
        """Another worker, by that transport."""
        attributes = {"transport": transport, "over": runs_over}
        self._histograms[names.LINK_RATE.name].record(measured.bytes_per_s, attributes)
        self._histograms[names.LINK_LATENCY.name].record(measured.latency_s, attributes)

    def moved(self, reason: str) -> None:
        """A move to another decode worker ended; `reason` is "" where it went, the error's name where it stays."""
        self.moved_sequences += not reason
        self._counters[names.MOVES.name].add(1, {names.ERROR_REASON: reason or "OK"})

    def refused(self, error: LegatoError) -> None:
        """A ticket that opens nothing, a chunk that is not what was computed."""
        self.refused_handoffs += 1
        self._counters[names.HANDOFFS_REFUSED.name].add(1, {"reason": error.reason})

    def quarantined(self, proof: str, duration_s: float) -> None:
        """Memory of a broken hand-over is free again. `proof`: word, cut."""
        self._histograms[names.QUARANTINE_DURATION.name].record(duration_s, {"proof": proof})

    def fetched(self, num_tokens: int) -> None:
        self.fetched_tokens += num_tokens
        self._counters[names.TOKENS_FETCHED.name].add(num_tokens)

    def tier_bytes(self, direction: str, num_bytes: int) -> None:
        """`direction`: stored or loaded."""
        self._counters[names.TIER_BYTES.name].add(num_bytes, {"direction": direction})

    def tier_hit(self, tier: str) -> None:
        self._counters[names.TIER_HITS.name].add(1, {"tier": tier})
