"""A step, as frozen data: what the scheduler decides and the engine executes. No tensor in it.

What is made for every sequence of every step is a named tuple: a third of a frozen dataclass's cost.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

from spec.sampling import SamplingParams, TokenLogprobs

__all__ = ["Draw", "Drawn", "Executor", "Proposal", "Slice", "StepPlan", "StepResult", "TokenLogprobs"]


class Draw(NamedTuple):
    """Draw the token at `position` of a sequence from the logits of the known token before it."""

    params: SamplingParams
    position: int  # index in the sequence of the token to draw: prompt_tokens + output tokens so far
    prompt_tokens: int  # output token i sits at position prompt_tokens + i
    history: tuple[int, ...]  # prompt and output token ids so far, when params.needs_history; else ()


@dataclasses.dataclass(frozen=True, slots=True)
class Proposal:
    """The draft model computes `token_ids`, known tokens, at positions from `start` on, and guesses the next ones."""

    token_ids: tuple[int, ...]
    start: int  # tokens whose KV the draft model has
    num_tokens: int  # guesses to make; 0: it only catches up


class Slice(NamedTuple):
    """One sequence's share of a step: compute `token_ids` at positions [start, start + len(token_ids)), and guessed
    tokens behind them, which the draws verify."""

    sequence_id: str
    token_ids: tuple[int, ...]
    start: int  # tokens whose KV is already in the blocks
    block_table: tuple[int, ...]  # blocks of positions [0, start + num_tokens)
    draw: Draw | None  # None: more of the sequence is still to be computed
    # Log-probabilities asked for of the prompt tokens that this slice's logits predict: positions start+1 .. start+len,
    # as far as they are still prompt. `targets` are those tokens.
    prompt_logprobs: int | None = None
    prompt_targets: tuple[int, ...] = ()
    adapter: str = ""  # its id; "": the base model
    # With guesses, one token more than was guessed right is drawn: `draw` is the first, and each guess is taken for
    # true in the draw behind it. They stand here, or come from the draft model while the step is executed.
    guessed_token_ids: tuple[int, ...] = ()
    proposal: Proposal | None = None

    @property
    def num_guesses(self) -> int:
        return len(self.guessed_token_ids) or (self.proposal.num_tokens if self.proposal is not None else 0)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_guesses


@dataclasses.dataclass(frozen=True, slots=True)
class StepPlan:
    """Slices in batch order; decodes (one token) and chunks may be mixed."""

    step: int
    slices: tuple[Slice, ...]
    # The slices as they were known while the step before was computed, in the same order: without the token and the
    # draw's history, and maybe without the last block of the table. None: this plan was not made ahead.
    ahead: tuple[Slice, ...] | None = dataclasses.field(default=None, compare=False)

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for piece in self.slices)


NO_TOKEN = -1  # Drawn.token_id where the logits had no finite maximum: the sequence fails, its neighbours go on


class Drawn(NamedTuple):
    token_id: int  # or NO_TOKEN
    logprobs: TokenLogprobs | None = None
    completes: bool = False  # the answer meets its constraint with this token, and none can follow
    refusal: str = ""  # with NO_TOKEN, why the constraint admits no token; "": the logits were not finite


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """One entry per slice of the plan, in its order."""

    # Empty without a draw; with guesses those that were right, and the token behind them. NO_TOKEN stands alone.
    drawn: tuple[tuple[Drawn, ...], ...]
    prompt_logprobs: tuple[tuple[TokenLogprobs, ...], ...]


class Executor(Protocol):
    """The engine, as the loop that drives it sees it."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Writes the KV of every slice's tokens into its blocks and draws where a slice says so."""
        ...
