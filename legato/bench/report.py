"""Records -> figures. What each means:

    TTFT            first token - when the request was due (open loop) or sent (closed loop)
    ITL             time between tokens: a gap between pieces that brought k tokens is k times gap / k
    TPOT            of a request: (last token - first) / (tokens - 1)
    end to end      end of the answer - when it was due or sent
    longest gap     of a request, between two pieces: what ITL evens out when tokens come in bunches
    goodput         requests/s that kept every limit of the SLO; one that failed kept none
    window          from the start of the load to the end of the last answer; all rates are over it

Latencies are of requests that finished. `to_json` is the document of `--json`; docs/bench.md describes it.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from legato.bench.quantiles import Summary, quantile, summary
from legato.bench.record import Record
from legato.bench.run import Run
from legato.bench.settings import Slo

SCHEMA = "legato.bench/1"
LATE_MS = 5.0  # a load generator this late does not matter, whatever it measures
MANY_IN_FLIGHT = 4

Latencies = dict[str, Summary | None]


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Figures of a run. Times are milliseconds, but for `window_s`; rates are for a second of the window.

    latency_ms              "ttft", "itl", "tpot", "end_to_end", "longest_gap"
    ledger_ms               by stage, of requests that had a second token; the stages' means sum to its time
    failures                requests by the reason of their error
    unfinished              still in flight when the load was stopped
    loaded_tokens_per_s     output tokens that came until the last arrival, over the time until then: without the end of
                            the run, in which fewer and fewer requests are in flight
    schedule_lag_ms         sending - when it was due; of an open loop
    loop_delay_ms           how late the load generator's event loop was, every 20 ms
    met                     requests that kept the SLO; None: there was none
    """

    run: Run
    records: list[Record]
    window_s: float
    finished: int
    unfinished: int
    failures: dict[str, int]
    latency_ms: Latencies
    ledger_ms: dict[str, Summary]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    proposed_tokens: int
    accepted_tokens: int
    offered_per_s: float | None
    loaded_tokens_per_s: float | None
    schedule_lag_ms: Summary | None
    loop_delay_ms: Summary | None
    handoffs: int
    moved_bytes: int
    met: int | None
    warnings: list[str]

    @property
    def failed(self) -> int:
        return sum(self.failures.values())

    @property
    def acceptance(self) -> float | None:
        """The share of guesses that were right; None: nobody guessed."""
        return self.accepted_tokens / self.proposed_tokens if self.proposed_tokens else None

    def per_s(self, count: float) -> float:
        return count / self.window_s if self.window_s > 0 else 0.0


def report(run: Run) -> Report:
    """Of what was measured so far: the load need not have ended."""
    load = run.load
    assert load is not None, "something was measured"
    done = [record for record in load.records if record.is_finished]
    last_due_s = max((record.due_s for record in load.records), default=0.0)
    is_open = run.settings.kind != "closed"
    transfers = [one.route.transfer for one in done if one.route is not None and one.route.transfer is not None]
    figures = Report(
        run=run,
        records=load.records,
        window_s=load.ended_s or load.elapsed_s,
        finished=len(done),
        unfinished=sum(record.ended_s is None for record in load.records),
        failures=dict(Counter(record.error.reason for record in load.records if record.error).most_common()),
        latency_ms=latencies_ms(done),
        ledger_ms=_ledger_ms(done),
        prompt_tokens=sum(record.prompt_tokens for record in done),
        cached_tokens=sum(record.route.prefill_cached_tokens for record in done if record.route),
        output_tokens=sum(record.output_tokens for record in done),
        proposed_tokens=sum(record.proposed_tokens for record in done),
        accepted_tokens=sum(record.accepted_tokens for record in done),
        offered_per_s=len(load.records) / last_due_s if is_open and last_due_s > 0 else None,
        loaded_tokens_per_s=_tokens_until(load.records, last_due_s) / last_due_s if last_due_s > 0 else None,
        schedule_lag_ms=summary((one.sent_s - one.due_s) * 1e3 for one in load.records) if is_open else None,
        loop_delay_ms=summary(delay_s * 1e3 for delay_s in load.delays_s),
        handoffs=len(transfers),
        moved_bytes=sum(transfer.moved_bytes for transfer in transfers),
        met=sum(meets(record, run.settings.slo) for record in load.records) if run.settings.slo.is_given else None,
        warnings=[],
    )
    return dataclasses.replace(figures, warnings=warnings_of(figures))


def latencies_ms(done: Sequence[Record]) -> Latencies:
    return {
        "ttft": summary(record.ttft_s * 1e3 for record in done if record.ttft_s is not None),
        "itl": summary(itl_s * 1e3 for record in done for itl_s in record.itls_s),
        "tpot": summary(record.tpot_s * 1e3 for record in done if record.tpot_s is not None),
        "end_to_end": summary(record.end_to_end_s * 1e3 for record in done if record.end_to_end_s is not None),
        "longest_gap": summary(max(record.gaps_s)[0] * 1e3 for record in done if record.gaps_s),
    }


def meets(record: Record, slo: Slo) -> bool:
    """A time that the request does not have (ITL of a single token) breaks no limit."""
    if not record.is_finished:
        return False
    itls_s = sorted(record.itls_s)
    limits: list[tuple[float | None, float | None]] = [
        (record.ttft_s, slo.ttft_ms),
        (quantile(itls_s, 0.99) if itls_s else None, slo.itl_ms),
        (record.tpot_s, slo.tpot_ms),
        (record.end_to_end_s, slo.e2e_ms),
    ]
    return all(time_s is None or limit_ms is None or time_s * 1e3 <= limit_ms for time_s, limit_ms in limits)


def _ledger_ms(done: Sequence[Record]) -> dict[str, Summary]:
    ledgers = [record.ledger.stages_s for record in done if record.ledger and record.ledger.second_token_s is not None]
    names = list(ledgers[0]) if ledgers else []
    found = {name: summary(stages[name] * 1e3 for stages in ledgers) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def _tokens_until(records: Sequence[Record], end_s: float) -> int:
    return sum(tokens for record in records for at_s, tokens in record.pieces if at_s <= end_s)


def warnings_of(figures: Report) -> list[str]:
    """What makes the figures say less than they seem to."""
    found = []
    ttft, itl = figures.latency_ms["ttft"], figures.latency_ms["itl"]
    lag, delay = figures.schedule_lag_ms, figures.loop_delay_ms
    if lag is not None and lag.p99 > max(LATE_MS, 0.1 * ttft.p50 if ttft else 0.0):
        found.append(
            f"the load generator sent late: p99 {lag.p99:.1f} ms, at most {lag.max:.1f} ms after the arrival was due. "
            "That is part of TTFT and end to end; give it a processor of its own or lower the load"
        )
    if delay is not None and delay.p99 > max(LATE_MS, 0.25 * itl.p50 if itl else 0.0):
        found.append(
            f"the load generator was busy: its event loop ran up to {delay.p99:.1f} ms late (p99), so tokens may have "
            "come that much earlier than written down"
        )
    if figures.failed:
        share = figures.failed / len(figures.records)
        found.append(f"{figures.failed} requests ({share:.1%}) failed: latencies are of those that finished")
    if _falls_behind(figures):
        found.append(
            "clearly more requests were in flight at the last arrival than half-way. Where they come faster than they "
            "are answered, latencies say how long the run was; run it longer, or at a lower rate"
        )
    if figures.unfinished:
        found.append(f"stopped with {figures.unfinished} requests in flight, which are in no latency")
    return found


def _falls_behind(figures: Report) -> bool:
    """Whether clearly more were in flight at the last arrival than half-way. A trace has bursts of its own, a closed
    loop as many as it was told."""
    if figures.run.settings.kind != "open" or not figures.records:
        return False
    last_s = max(record.due_s for record in figures.records)
    half, end = (in_flight(figures.records, at_s) for at_s in (last_s / 2, last_s))
    return end > 1.5 * half + MANY_IN_FLIGHT


def in_flight(records: Sequence[Record], at_s: float) -> int:
    """Due, and not ended."""
    return sum(one.due_s <= at_s and (one.ended_s is None or one.ended_s > at_s) for one in records)


def to_json(figures: Report) -> dict[str, Any]:
    """Plain data for json.dumps. Names are never renamed within a SCHEMA; new ones may come."""
    run = figures.run
    assert run.model is not None and run.cluster is not None and run.plan is not None, "something was measured"
    settings = dataclasses.asdict(run.settings)
    slo = settings.pop("slo")
    for name, value in settings.items():
        original = getattr(run.settings, name)
        settings[name] = str(original) if dataclasses.is_dataclass(original) or isinstance(value, Path) else value
    attainment = None if figures.met is None else figures.met / max(1, len(figures.records))
    roles = Counter(worker.role for worker in run.cluster.workers if worker.state == "ready")
    return {
        "schema": SCHEMA,
        "versions": {name: _version(name) for name in ("legato", "grpcio")} | {"python": platform.python_version()},
        "arguments": settings,
        "seed": run.settings.seed,
        "load": run.settings.kind,
        "model": {"id": run.model.id, "revision": run.model.revision},
        "workers": dict(roles),
        "interrupted": run.is_interrupted,
        "window_s": figures.window_s,
        "requests": {
            "sent": len(figures.records),
            "finished": figures.finished,
            "failed": figures.failed,
            "unfinished": figures.unfinished,
            "warmup_excluded": len(run.plan.warmup),
            "failures": figures.failures,
        },
        "requests_per_s": {"offered": figures.offered_per_s, "finished": figures.per_s(figures.finished)},
        "tokens": {"prompt": figures.prompt_tokens, "cached": figures.cached_tokens, "output": figures.output_tokens},
        "tokens_per_s": {
            "prompt": figures.per_s(figures.prompt_tokens),
            "output": figures.per_s(figures.output_tokens),
            "output_until_last_arrival": figures.loaded_tokens_per_s,
        },
        "latency_ms": {name: _plain(one) for name, one in figures.latency_ms.items()},
        "ledger_ms": {name: _plain(one) for name, one in figures.ledger_ms.items()},
        "slo": {
            "limits_ms": {name.removesuffix("_ms"): limit for name, limit in slo.items()},
            "met": figures.met,
            "attainment": attainment,
            "goodput_requests_per_s": None if figures.met is None else figures.per_s(figures.met),
        },
        "speculation": {
            "proposed_tokens": figures.proposed_tokens,
            "accepted_tokens": figures.accepted_tokens,
            "acceptance": figures.acceptance,
        },
        "handoff": {"requests": figures.handoffs, "moved_bytes": figures.moved_bytes},
        "load_generator": {
            "schedule_lag_ms": _plain(figures.schedule_lag_ms),
            "event_loop_delay_ms": _plain(figures.loop_delay_ms),
        },
        "warnings": figures.warnings,
        "per_request": [_row(record) for record in figures.records],
    }


def _row(record: Record) -> dict[str, Any]:
    return {
        "due_s": record.due_s,
        "sent_s": record.sent_s,
        "ttft_ms": None if record.ttft_s is None else record.ttft_s * 1e3,
        "tpot_ms": None if record.tpot_s is None else record.tpot_s * 1e3,
        "end_to_end_ms": None if record.end_to_end_s is None else record.end_to_end_s * 1e3,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "failure": record.error.reason if record.error else None,
    }


def _plain(one: Summary | None) -> dict[str, float] | None:
    return None if one is None else dataclasses.asdict(one)


def _version(distribution: str) -> str | None:
    """None: it was not installed as a package (`python -m` from the source tree)."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
