"""What was asked for, checked before anything is sent."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from legato.bench import arrivals, traces
from legato.bench.arrivals import Arrival
from legato.bench.lengths import Lengths
from legato.errors import InvalidParameter

DEFAULT_REQUESTS = 64
DEFAULT_CONCURRENCY = 4
DEFAULT_OUTPUT = Lengths("uniform", 128, 128, "128")
FIT = "fit"


@dataclasses.dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to count for goodput, in milliseconds; None: no such limit.

    itl     the 99th percentile of the request's own inter-token latencies
    tpot    its mean time for each token after the first
    """

    ttft_ms: float | None = None
    itl_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @property
    def is_given(self) -> bool:
        return any(limit is not None for limit in dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """One of rate (requests/s, open loop), trace (open loop) and concurrency (closed loop); none is concurrency 4.

    requests        at most; None: all of a trace, DEFAULT_REQUESTS where there is neither trace nor duration_s
    duration_s      none is begun later; those begun are waited for
    warmup          requests that are sent and answered before, and are in no figure
    prompt_tokens   None: as long as the texts are
    output_tokens   at most; None: those of a trace, else DEFAULT_OUTPUT
    nonce           prompts begin with it: with another, nothing that an earlier run left in a prefix cache fits
    scale_lengths   of a trace: a factor, or FIT for the largest that fits into the model's context
    """

    rate: float | None = None
    concurrency: int | None = None
    trace: Path | None = None
    requests: int | None = None
    duration_s: float | None = None
    warmup: int = 4
    prompts: Path | None = None
    prompt_tokens: Lengths | None = None
    output_tokens: Lengths | None = None
    ignore_eos: bool | None = None  # None: with a trace, whose lengths are the load; else an answer ends where it ends
    speed: float = 1.0
    scale_lengths: float | str = 1.0
    model: str = ""
    temperature: float = 0.0
    speculation: str | None = None  # who guesses: "prompt_lookup" or "draft_model"; None: nobody
    timeout_s: float = 120.0
    seed: int = 0
    nonce: int = 0
    slo: Slo = Slo()

    def __post_init__(self) -> None:
        kinds = {"--rate": self.rate, "--trace": self.trace, "--concurrency": self.concurrency}
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise _wrong(given[1], f"cannot go with {given[0]}: one says when requests come, and only one can")
        if self.trace is None and (self.speed != 1.0 or self.scale_lengths != 1.0):
            raise _wrong("--speed" if self.speed != 1.0 else "--scale-lengths", "is for a --trace")
        if self.trace is not None and self.prompt_tokens is not None:
            raise _wrong(
                "--prompt-tokens", "cannot go with --trace: the trace has lengths; --scale-lengths scales them"
            )
        limits = {f"--slo-{field.name[:-3]}-ms": getattr(self.slo, field.name) for field in dataclasses.fields(Slo)}
        factor = self.scale_lengths if isinstance(self.scale_lengths, float) else None
        positive = {"--rate": self.rate, "--duration": self.duration_s, "--speed": self.speed} | limits
        for name, value in (positive | {"--scale-lengths": factor}).items():
            if value is not None and not 0 < value < math.inf:
                raise _wrong(name, f"must be a number above 0, is {value}")
        for name, value in {"--requests": self.requests, "--concurrency": self.concurrency}.items():
            if value is not None and value < 1:
                raise _wrong(name, f"must be at least 1, is {value}")
        for name, value in {"--warmup": self.warmup, "--nonce": self.nonce}.items():
            if value < 0:
                raise _wrong(name, f"must not be negative, is {value}")

    @property
    def kind(self) -> str:
        """ "open" (Poisson), "trace" or "closed"."""
        return "open" if self.rate is not None else "trace" if self.trace is not None else "closed"

    @property
    def users(self) -> int:
        """In flight at once in a closed loop, and in the warm-up of any."""
        return self.concurrency or DEFAULT_CONCURRENCY

    @property
    def exact_length(self) -> bool:
        return self.kind == "trace" if self.ignore_eos is None else self.ignore_eos

    @property
    def needs_tokens(self) -> bool:
        return self.prompt_tokens is not None or self.trace is not None

    @property
    def limit(self) -> int | None:
        """Requests at most, None: the trace's or the duration's end is the end."""
        if self.requests is None and self.trace is None and self.duration_s is None:
            return DEFAULT_REQUESTS
        return self.requests


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """The load of some settings. `arrivals` is used up by sending; `total` is None where only time ends it."""

    arrivals: Iterator[Arrival]
    total: int | None
    block_tokens: int
    warmup: list[Arrival]


def plan(settings: Settings, context_tokens: int) -> Plan:
    """Reads the trace, where there is one. Raises InvalidParameter, also where a trace does not fit into the model."""
    if settings.trace is not None:
        return _trace_plan(settings, context_tokens)
    lengths = settings.prompt_tokens, settings.output_tokens or DEFAULT_OUTPUT
    if settings.rate is None:  # in a closed loop the time of an arrival is its user's
        times_s: Iterator[float] = itertools.repeat(0.0)
        come = arrivals.drawn(times_s, *lengths, settings.seed)
        warmup = list(arrivals.limited(arrivals.drawn(times_s, *lengths, settings.seed + 1), settings.warmup, None))
        return Plan(arrivals.limited(come, settings.limit, None), settings.limit, traces.BLOCK_TOKENS, warmup)
    times_s = arrivals.poisson_times_s(settings.rate, settings.seed)
    due = list(arrivals.limited(arrivals.drawn(times_s, *lengths, settings.seed), settings.limit, settings.duration_s))
    if not due:
        raise _wrong("--duration", f"is over before the first request at --rate {settings.rate:g} comes")
    warmup = list(arrivals.limited(arrivals.drawn(times_s, *lengths, settings.seed + 1), settings.warmup, None))
    return Plan(iter(due), len(due), traces.BLOCK_TOKENS, warmup)


def _trace_plan(settings: Settings, context_tokens: int) -> Plan:
    assert settings.trace is not None
    come = traces.read_trace(settings.trace, settings.speed)
    due = list(arrivals.limited(come, settings.requests, settings.duration_s))
    given, factor = settings.output_tokens, settings.scale_lengths
    if given is not None:
        lengths = arrivals.drawn((one.at_s for one in due), None, given, settings.seed)
        due = [
            dataclasses.replace(one, output_tokens=drawn.output_tokens) for one, drawn in zip(due, lengths, strict=True)
        ]
    if isinstance(factor, str):
        factor = traces.fitting_scale(due, context_tokens, keeps_outputs=given is not None)
    due = traces.scaled(due, factor, keeps_outputs=given is not None)
    too_long = sum((one.prompt_tokens or 0) + one.output_tokens > context_tokens for one in due)
    if too_long:
        raise _wrong(
            "--trace",
            f"has {too_long} of {len(due)} requests that are longer than the model's context of {context_tokens} "
            f"tokens; "
            + (f"--scale-lengths {FIT} makes all fit" if settings.scale_lengths != FIT else "lower --output-tokens"),
        )
    warmup = [dataclasses.replace(one, prefix_ids=()) for one in due[: settings.warmup]]
    return Plan(iter(due), len(due), traces.scaled_block_tokens(factor), warmup)


def _wrong(option: str, message: str) -> InvalidParameter:
    return InvalidParameter(f"{option} {message}", details={"field": option})
