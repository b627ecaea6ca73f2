"""Guesses at the next tokens of a sequence, for the step to verify (speculative decoding).

A guess is right or wrong, it never sways: the token at a position is drawn from the model's own distribution with the
numbers of (seed, position), as without guesses, and the guess is accepted if it is that token. So an answer
is bit for bit the one without speculation where a row's logits do not depend on the rows beside it: on a CPU with the
compiled kernels; on a GPU they may differ by rounding. (The rule of Leviathan et al. 2023, arXiv:2211.17192, keeps the
distribution alone: which token comes would depend on what was guessed.)
"""

from __future__ import annotations

from scheduler.blocks import BlockPool
from scheduler.config import SchedulerConfig
from scheduler.plan import Proposal
from scheduler.prompt_lookup import PromptLookup
from scheduler.sequence import Sequence


class Guesser:
    """Who guesses for a sequence that owes one token, and how much. Takes blocks of `pool` for it, from nobody."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, context_limit: int) -> None:
        self._config, self._pool, self._context_limit = config, pool, context_limit
        self._catch_up = 0

    def begin_step(self) -> None:
        """A step's worth of known tokens may be computed by the draft model in it."""
        self._catch_up = self._config.max_step_tokens

    def guess(self, sequence: Sequence, spare: int, room_blocks: int) -> tuple[tuple[int, ...], Proposal | None]:
        """`spare`: guesses that the step has room for. `room_blocks`: blocks of the pool that may be taken."""
        assert sequence.params.speculation is not None
        most = min(spare, room_for_guesses(sequence, self._context_limit))
        if sequence.params.speculation.kind == "prompt_lookup":
            guesses = self._look_up(sequence, most)
            return guesses[: self._room_behind(sequence, len(guesses), room_blocks)], None
        if not self._config.draft_model:
            return (), None
        return (), self._propose(sequence, self._room_behind(sequence, most, room_blocks))

    def _look_up(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        assert sequence.params.speculation is not None
        if sequence.lookup is None:
            sequence.lookup = PromptLookup(sequence.params.speculation.ngram)
        sequence.lookup.extend(sequence.tokens(sequence.lookup.num_tokens, sequence.known_tokens))
        return sequence.lookup.guess(num_tokens)

    def _propose(self, sequence: Sequence, num_tokens: int) -> Proposal | None:
        """Where more known tokens would have to be computed first than the step has left, so many are computed, and
        guesses come another time. None: there is nothing for the draft model to do."""
        start, known = sequence.draft_computed_tokens, sequence.known_tokens
        if known - start > self._catch_up:
            known, num_tokens = start + self._catch_up, 0
        elif num_tokens == 0:
            return None
        self._catch_up -= known - start
        return Proposal(sequence.tokens(start, known), start, num_tokens) if known > start else None

    def _room_behind(self, sequence: Sequence, num_tokens: int, room_blocks: int) -> int:
        """Positions behind the known tokens for which it has blocks now; `num_tokens` at most."""
        table = sequence.block_table
        missing = self._pool.blocks_for(sequence.known_tokens + num_tokens) - len(table)
        if 0 < missing <= room_blocks:
            table += self._pool.allocate(missing)
        return max(0, min(num_tokens, len(table) * self._pool.block_tokens - sequence.known_tokens))


def room_for_guesses(sequence: Sequence, context_limit: int) -> int:
    """As many as can be accepted and leave a token to draw."""
    assert sequence.params.speculation is not None
    output, known = len(sequence.output_token_ids), sequence.known_tokens
    most = min(sequence.params.max_tokens - output, context_limit - known) - 1
    if sequence.draws_here is not None:
        most = min(most, sequence.draws_here - sequence.drawn_here - 1)
    return max(0, min(most, sequence.params.speculation.num_draft_tokens, sequence.guess_limit))


def guess_limit_after(proposed_tokens: int, accepted_tokens: int) -> int:
    """How many to guess next: one more than were right, two more where all were. A wrong guess costs a row of a step,
    and text that was hard to guess a moment ago mostly still is."""
    return accepted_tokens + (2 if accepted_tokens == proposed_tokens else 1)


def draft_computed_after(proposal: Proposal, known_tokens: int, accepted_tokens: int) -> int:
    """Tokens whose KV the draft model has once `accepted_tokens` of its guesses were found right. It computes each
    guess to make the next one, and so not the last."""
    if proposal.num_tokens == 0:
        return proposal.start + len(proposal.token_ids)
    return known_tokens + min(accepted_tokens, proposal.num_tokens - 1)
