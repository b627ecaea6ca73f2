"""Speculative decoding: one step verifies several guessed tokens, and a smaller model makes guesses.

Whatever guesses, the token at a position is drawn from the model's own distribution p by a race with the numbers of
(seed, position, token) (kernels/sampling.py), and the guess is accepted if it is that token. So no token depends on a
guess, and what is drawn at each position is what is drawn there without speculation: exact in distribution, and bit for
bit the same answer where a row's logits do not depend on the rows beside it (on a CPU with the compiled kernels,
replicated experts excepted; on a GPU they do, by rounding).

The draft model runs its own distribution q through the same race. The two agree with probability
sum_x 1 / sum_y max(p(y) / p(x), q(y) / q(x)) (Daliri et al. 2024, arXiv:2408.07978), at least (1 - d) / (1 + d) where
1 - d = sum_x min(p(x), q(x)) is the most that any coupling of p and q can reach. The rule of Leviathan et al. 2023
(arXiv:2211.17192) reaches that, and draws anew where it rejects; the answer then depends on the guesses. At temperature
0 both ask for the same likeliest token. docs/log.md has the figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from scheduler.plan import NO_TOKEN, Draw, Drawn, Executor, Slice, StepPlan
from spec.errors import InvalidConfiguration
from spec.model import ModelSpec


def draws_of(piece: Slice) -> list[Draw]:
    """One behind the known tokens, and one behind each guess, with the guesses before it as history."""
    first = piece.draw
    if first is None:
        return []
    guesses = piece.guessed_token_ids
    if not guesses:
        return [first]
    return [first] + [_later(first, guesses[:count]) for count in range(1, len(guesses) + 1)]


def _later(first: Draw, guesses: tuple[int, ...]) -> Draw:
    history = (*first.history, *guesses) if first.params.needs_history else ()
    return first._replace(position=first.position + len(guesses), history=history)


def verified(guesses: Sequence[int], drawn: Sequence[Drawn]) -> tuple[Drawn, ...]:
    """Of what draws_of() drew, what follows from known tokens: as far as the guesses are right, and the token behind.

    NO_TOKEN stands alone: behind right guesses it is left to the next step, which finds it first."""
    if not guesses:
        return tuple(drawn)
    for count, (guess, each) in enumerate(zip(guesses, drawn, strict=False)):
        if each.token_id == NO_TOKEN:
            return tuple(drawn[: max(count, 1)])
        if each.token_id != guess:
            return tuple(drawn[: count + 1])
    return tuple(drawn[:-1] if drawn[-1].token_id == NO_TOKEN else drawn)


class DraftModel:
    """Guesses for a model whose tokens it knows. Its KV lies in blocks of the same numbers, in a memory of its own.

    It keeps nothing between steps but that KV: a Proposal says which known tokens it has to compute."""

    def __init__(self, engine: Executor) -> None:
        self._engine = engine

    def guess(self, slices: tuple[Slice, ...]) -> tuple[Slice, ...]:
        """The same slices, with guesses in those that ask for some. Takes a step of the draft model for each guess of
        the one that asks for most."""
        guesses: dict[int, list[int]] = {}
        pending: dict[int, tuple[tuple[int, ...], int]] = {}  # place -> tokens to compute, and where they begin
        for place, piece in enumerate(slices):
            if piece.proposal is not None:
                guesses[place] = []
                pending[place] = piece.proposal.token_ids, piece.proposal.start
        while pending:
            shares = [_share(slices[place], guesses[place], *share) for place, share in pending.items()]
            result = self._engine.execute(StepPlan(0, tuple(shares)))
            following: dict[int, tuple[tuple[int, ...], int]] = {}
            for (place, (token_ids, start)), drawn in zip(pending.items(), result.drawn, strict=True):
                if not drawn or drawn[0].token_id == NO_TOKEN:
                    continue
                guesses[place].append(drawn[0].token_id)
                if len(guesses[place]) < slices[place].num_guesses:
                    following[place] = (drawn[0].token_id,), start + len(token_ids)
            pending = following
        return tuple(
            piece._replace(guessed_token_ids=tuple(guesses[place]), proposal=None) if place in guesses else piece
            for place, piece in enumerate(slices)
        )


def _share(piece: Slice, guesses: list[int], token_ids: tuple[int, ...], start: int) -> Slice:
    """A step of the draft model: with the draw that the position will have, and so the same numbers."""
    draw = piece.draw
    if piece.num_guesses == 0 or draw is None:
        return Slice(piece.sequence_id, token_ids, start, piece.block_table, None)
    params = dataclasses.replace(draw.params, logprobs=None, prompt_logprobs=None, speculation=None, constraint=None)
    draw = _later(draw._replace(params=params), tuple(guesses))
    return Slice(piece.sequence_id, token_ids, start, piece.block_table, draw)


def check_draft(target: ModelSpec, draft: ModelSpec, max_context_tokens: int) -> None:
    """`max_context_tokens`: of the worker. Raises InvalidConfiguration where the draft model cannot guess for it."""
    if draft.vocab_size != target.vocab_size:
        raise InvalidConfiguration(
            f"the draft model has a vocabulary of {draft.vocab_size} tokens, the model one of {target.vocab_size}"
        )
    if draft.max_context_tokens < max_context_tokens:
        raise InvalidConfiguration(
            f"the draft model's context is {draft.max_context_tokens} tokens, the worker's {max_context_tokens}; "
            f"set engine.max_context_tokens to {draft.max_context_tokens} or less"
        )
