"""What the client gives back. Loads nothing but the standard library.

A request has n choices (1 unless asked for more); what an Answer says of text, tokens, route and ledger is choice 0's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypedDict

FinishReason = Literal["stop", "length"]


class Message(TypedDict):
    """One turn of a chat. `role` is "system", "user", "assistant" or what the model's template knows."""

    role: str
    content: str


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural) under the model itself, before temperature, penalties and bias.

    `top` maps the likeliest token ids to theirs, likeliest first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one choice, as soon as they were known.

    `index` is the place in the answer of the first of them: indices run from 0 without gap or repeat. `text` is what
    they add to the text; a half character waits for its rest, so it may be empty, and the last piece of a choice may
    hold text that was held back and no token. `logprobs` is one entry for each token, or None when not asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    index: int
    logprobs: tuple[TokenLogprobs, ...] | None
    choice: int


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    proposed_tokens: int = 0  # guesses that speculation made
    accepted_tokens: int = 0  # of these, tokens of the answer

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class Transfer:
    """What the hand-over from prefill to decode moved, as the sender counted it."""

    transport: str
    moved_bytes: int
    pieces: int
    sent_tokens: int
    skipped_tokens: int  # already in the decode worker's prefix cache
    moving_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Who ran the request. `transfer` is None where nothing was handed over; a worker's id is then "" for the part that
    had no worker of its own. `attempts` counts placements by the router, `moves` those from one decode worker to
    another while it ran, `sends` the sends by this client."""

    router_id: str
    prefill_worker_id: str
    decode_worker_id: str
    attempts: int
    moves: int
    sends: int
    prefill_cached_tokens: int
    transfer: Transfer | None


@dataclasses.dataclass(frozen=True, slots=True)
class Ledger:
    """Where the time to the second token went, in seconds.

        route | queue | prefill | exposed transfer | decode queue | first decode step
        sent  ...               ^ first token drawn                                  ^ second token at the client

    The six stages sum to `second_token_s`, which the client measured with its own monotonic clock. An answer of one
    token has only the first three; the rest is None. The boundaries between were taken by the clocks of the machines
    that passed them; where those disagree, boundaries are moved into order, by `clock_shift_s` at most.
    """

    route_s: float
    queue_s: float
    prefill_s: float
    exposed_transfer_s: float | None
    decode_queue_s: float | None
    first_decode_step_s: float | None
    ttft_s: float  # the first token at the client
    second_token_s: float | None
    clock_shift_s: float

    @property
    def stages_s(self) -> dict[str, float]:
        """The stages that were passed, in order."""
        named = {
            "route": self.route_s,
            "queue": self.queue_s,
            "prefill": self.prefill_s,
            "exposed transfer": self.exposed_transfer_s,
            "decode queue": self.decode_queue_s,
            "first decode step": self.first_decode_step_s,
        }
        return {name: seconds for name, seconds in named.items() if seconds is not None}

    @property
    def total_s(self) -> float:
        return sum(self.stages_s.values())


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One of the n answers. `finish_reason`, `route` and `ledger` are None while the stream has not come that far."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    stop_string: str | None  # the one that ended it
    logprobs: tuple[TokenLogprobs, ...] | None
    usage: Usage
    route: Route | None
    ledger: Ledger | None


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """The whole of a request. Text, tokens, finish, log-probabilities, route and ledger are those of choice 0."""

    request_id: str
    model: str
    seed: int | None  # the seed in use; choice i drew with seed + i
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None  # of prompt tokens 1, 2, ...
    choices: tuple[Choice, ...]
    duration_s: float  # from sending to the last token

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.choices[0].logprobs

    @property
    def route(self) -> Route | None:
        return self.choices[0].route

    @property
    def ledger(self) -> Ledger | None:
        return self.choices[0].ledger

    @property
    def usage(self) -> Usage:
        """The prompt once, and the tokens of all choices."""
        prompt_tokens = max(choice.usage.prompt_tokens for choice in self.choices)
        usages = [choice.usage for choice in self.choices]
        return Usage(
            prompt_tokens,
            sum(usage.completion_tokens for usage in usages),
            sum(usage.proposed_tokens for usage in usages),
            sum(usage.accepted_tokens for usage in usages),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for json.dumps."""
        plain = dataclasses.asdict(self)
        return {"text": self.text, "finish_reason": self.finish_reason, "usage": dataclasses.asdict(self.usage)} | plain


@dataclasses.dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that requests may ask for by name. `revision` is a digest of its files; where several are served,
    a new request gets one that both pools have."""

    name: str
    revision: str


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    id: str
    revision: str
    max_context_tokens: int
    vocab_size: int
    chat: bool  # has a chat template
    adapters: tuple[Adapter, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Quantiles:
    p50: float
    p90: float
    p99: float
    count: int


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker as the router sees it. `free_blocks` counts cached blocks that can be evicted."""

    worker_id: str
    role: str  # "prefill" or "decode"
    address: str
    state: str  # "ready", "draining", "lost"
    waiting_requests: int
    running_requests: int
    charged_tokens: int
    total_blocks: int
    free_blocks: int
    tokens_per_s: float
    transferred_bytes: int
    transport: str
    steps: int
    preemptions: int
    refused_handoffs: int
    moved_sequences: int  # that went on at another decode worker while they ran
    pid: int
    quarantined_blocks: int  # of hand-overs that failed, into which a write may still land; of no use until none can


@dataclasses.dataclass(frozen=True, slots=True)
class ClusterView:
    """What an operator watches. `registry_reachable` False: Redis is away, the router goes on with what it knows."""

    router_id: str
    workers: tuple[WorkerView, ...]
    waiting_requests: int
    running_requests: int
    finished_requests: int
    failed_requests: int
    ttft_s: Quantiles
    itl_s: Quantiles
    registry_reachable: bool
