"""How a sequence's tokens are drawn, as a worker needs to know it. Text (stop strings, n answers) is the router's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from spec.constraint import Constraint
from spec.errors import InvalidParameter


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Under the model itself, natural logarithm; `top` is ((token id, logprob), ...), likeliest first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


SpeculationKind = Literal["prompt_lookup", "draft_model"]

MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_DRAFT_TOKENS = 32
MAX_NGRAM = 16
# Log-probabilities that one message of an answer carries at most: its own and those of its `top`, of every token in it.
# On the wire one takes 10 bytes at most, so they are 20 MiB of the 64 MiB that a message may have
# (service/config.py); a whole vocabulary for one token, and the own ones of a prompt of two million tokens, fit.
MAX_MESSAGE_LOGPROBS = 2 * 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Speculation:
    """Who guesses the next tokens, for one step to verify several. It sways speed alone: an answer has the
    distribution of the one without, and where a row's logits do not depend on the rows beside it (README.md, "What it
    holds to": a CPU with the compiled kernels; on a GPU they may differ by rounding) it is bit for bit the same.

    "prompt_lookup": what followed the newest `ngram` tokens the last time. "draft_model": the draft model of the worker
    that decodes; where it has none, nothing is guessed.
    """

    kind: SpeculationKind
    num_draft_tokens: int = 4
    ngram: int = 3  # of prompt lookup

    def validate(self) -> None:
        """Raises InvalidParameter, naming the first field that is out of range."""
        for field, value, most in (
            ("num_draft_tokens", self.num_draft_tokens, MAX_DRAFT_TOKENS),
            ("ngram", self.ngram, MAX_NGRAM),
        ):
            if not 1 <= value <= most:
                raise InvalidParameter(f"must be between 1 and {most}, is {value}", field=field)


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """Greedy at temperature 0; otherwise the draw is a function of (seed, token position) alone: each token id has a
    number of both, and kernels/sampling.py races them. Another release may draw other tokens from a seed.

    Order: constraint, logit bias and penalties, temperature, top-k, top-p, min-p, draw. `logprobs` are the model's own,
    before all of these: None = none, 0 = the chosen token's, k = also the k likeliest. `forced_token_ids` are taken as
    the first tokens of the answer whatever the model would draw (teacher forcing); a constraint they must keep.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    forced_token_ids: tuple[int, ...] = ()
    speculation: Speculation | None = None
    constraint: Constraint | None = None

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on the tokens before it by more than their logits."""
        return self.has_penalties or self.constraint is not None

    def validate(self, vocab_size: int) -> None:
        """Raises InvalidParameter, naming the first field that is out of range."""
        if self.max_tokens < 1:
            raise InvalidParameter(f"must be at least 1, is {self.max_tokens}", field="max_tokens")
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        if self.top_p == 0.0:
            raise InvalidParameter("must be above 0, is 0", field="top_p")
        if self.top_k < 0:
            raise InvalidParameter(f"must be 0 (off) or more, is {self.top_k}", field="top_k")
        for field, asked in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if asked is not None and not 0 <= asked <= vocab_size:
                raise InvalidParameter(f"must be between 0 and the vocabulary's {vocab_size}, is {asked}", field=field)
        self._check_ids(vocab_size)
        if self.speculation is not None:
            self.speculation.validate()
        if self.constraint is not None:
            self.constraint.validate()
            if self.ignore_eos:
                raise InvalidParameter(
                    f"cannot be asked for together with {self.constraint.kind}: nothing follows the end of its answer",
                    field="ignore_eos",
                )

    def _check_ids(self, vocab_size: int) -> None:
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise InvalidParameter(
                f"holds {len(self.stop_token_ids)} ids, at most {MAX_STOP_TOKENS} are taken", field="stop_token_ids"
            )
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidParameter(
                f"holds {len(self.logit_bias)} ids, at most {MAX_LOGIT_BIAS} are taken", field="logit_bias"
            )
        if len(self.forced_token_ids) > self.max_tokens:
            raise InvalidParameter("holds more tokens than max_tokens", field="forced_token_ids")
        for field, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("logit_bias", tuple(self.logit_bias)),
            ("forced_token_ids", self.forced_token_ids),
        ):
            check_token_ids(ids, vocab_size, field=field)
        for token_id, bias in self.logit_bias.items():
            if not math.isfinite(bias):
                raise InvalidParameter(f"of token {token_id} must be finite, is {bias}", field="logit_bias")


def check_logprobs_fit(params: SamplingParams, prompt_tokens: int) -> None:
    """Raises InvalidParameter where one message of the answer would hold more than MAX_MESSAGE_LOGPROBS.

    The prompt's go out with the first token, in one message: prompt_tokens * (prompt_logprobs + 1). Of the answer's,
    a message holds those of a step: logprobs + 1 for each guess that was right, and for the token behind them.
    """
    step_tokens = 1 if params.speculation is None else params.speculation.num_draft_tokens + 1
    of_step = 0 if params.logprobs is None else step_tokens * (params.logprobs + 1)
    of_prompt = 0 if params.prompt_logprobs is None else prompt_tokens * (params.prompt_logprobs + 1)
    if of_step + of_prompt > MAX_MESSAGE_LOGPROBS:
        field, asked, tokens = (
            ("prompt_logprobs", params.prompt_logprobs, prompt_tokens)
            if of_prompt > of_step
            else ("logprobs", params.logprobs, step_tokens)
        )
        raise InvalidParameter(
            f"of {asked} for {tokens} tokens makes {of_step + of_prompt} log-probabilities in one message,"
            f" at most {MAX_MESSAGE_LOGPROBS} fit",
            field=field,
        )


def check_token_ids(ids: Sequence[int], vocab_size: int, *, field: str) -> None:
    """Raises InvalidParameter with the first id outside [0, vocab_size)."""
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab_size)
        raise InvalidParameter(f"holds {wrong}, outside the vocabulary [0, {vocab_size})", field=field)


def _within(field: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also refuses NaN
        raise InvalidParameter(f"must be between {low:g} and {high:g}, is {value}", field=field)
