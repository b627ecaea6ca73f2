"""What a committed step means for the sequences in it, as the services are told."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

from scheduler.plan import Drawn, TokenLogprobs
from spec.errors import LegatoError

Finish = Literal["stop", "length"]


class Computed(NamedTuple):
    """KV of positions [0, first_token + num_tokens) is in `block_table`; [first_token, ...) since the last one.

    The blocks stay while the sequence lives. Who reads them for longer takes references: `pool.hold(block_table)`."""

    sequence_id: str
    first_token: int
    num_tokens: int
    block_table: tuple[int, ...]
    group: int = 0  # the one of the worker's groups whose blocks they are


class Tokens(NamedTuple):
    """Tokens of the answer, from index `first_index` on. `finish` set: the sequence has ended. `held`: it has drawn
    what it should here, and its blocks wait for `release()`. Times are on the scheduler's clock."""

    sequence_id: str
    first_index: int
    drawn: tuple[Drawn, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]  # with the first token of the answer: of prompt tokens 1, 2, ...
    finish: Finish | None
    held: bool
    cached_tokens: int
    queued_s: float
    started_s: float
    drawn_s: float
    proposed_tokens: int = 0  # guesses that the step verified
    accepted_tokens: int = 0  # of these, tokens of the answer


@dataclasses.dataclass(frozen=True, slots=True)
class Failed:
    """The sequence has ended without a finish."""

    sequence_id: str
    error: LegatoError


@dataclasses.dataclass(frozen=True, slots=True)
class Preempted:
    """Its blocks were needed by an older one; it goes on later, and no token is lost."""

    sequence_id: str


Event = Computed | Tokens | Failed | Preempted
