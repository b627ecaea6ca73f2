"""An engine of a few lines whose every token depends on every KV entry before it, read through the block table.

A wrong, stale or missing block anywhere in a context changes all that is drawn after it, so tokens that are right prove
that every block was. The oracle computes the same function of the tokens alone, without blocks, batches or chunks.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence as Tokens
from types import SimpleNamespace

import pytest

from scheduler.batch import Scheduler
from scheduler.plan import Drawn, Slice, StepPlan, StepResult, TokenLogprobs
from spec.sampling import SamplingParams

VOCAB = 50
MASK = (1 << 61) - 1


def mix(state: int, value: int) -> int:
    return ((state * 6364136223846793005 + value * 1442695040888963407 + 1) ^ (state >> 29)) & MASK


def next_token(state: int, params: SamplingParams, output_tokens: int) -> int:
    if output_tokens < len(params.forced_token_ids):
        return params.forced_token_ids[output_tokens]
    return mix(state, params.seed) % VOCAB


def score(state: int, token_id: int) -> TokenLogprobs:
    return TokenLogprobs(-float(mix(state, token_id) % 1000))


def kv_of(token_ids: Tokens[int]) -> list[int]:
    """The KV entry of every position, as far as tokens alone determine it."""
    state, entries = 7, []
    for token_id in token_ids:
        entry = mix(state, token_id)
        entries.append(entry)
        state = mix(state, entry)
    return entries


def state_after(entries: Tokens[int]) -> int:
    state = 7
    for entry in entries:
        state = mix(state, entry)
    return state


def answer(
    prompt: Tokens[int], output: Tokens[int], params: SamplingParams, eos: Tokens[int], context_limit: int
) -> tuple[list[int], str]:
    """The oracle: all output tokens and the finish reason."""
    tokens, drawn = [*prompt, *output], list(output)
    state = state_after(kv_of(tokens))
    while True:
        token_id = next_token(state, params, len(drawn))
        drawn.append(token_id)
        tokens.append(token_id)
        if token_id in params.stop_token_ids or (token_id in eos and not params.ignore_eos):
            return drawn, "stop"
        if len(drawn) >= params.max_tokens or len(tokens) >= context_limit:
            return drawn, "length"
        state = mix(state, mix(state, token_id))


def prompt_scores(prompt: Tokens[int]) -> tuple[TokenLogprobs, ...]:
    entries = kv_of(prompt)
    return tuple(score(state_after(entries[: i + 1]), prompt[i + 1]) for i in range(len(prompt) - 1))


class FakeEngine:
    """KV memory: `memory[block][slot]`, one integer per token. The draft model has one of its own, and guesses wrong
    one time in four."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.memory = [[-1] * block_tokens for _ in range(num_blocks)]
        self.draft_memory = [[-1] * block_tokens for _ in range(num_blocks)]
        self.guessed = self.caught_up = 0

    def read(self, block_table: Tokens[int], num_tokens: int) -> list[int]:
        size = self.block_tokens
        return [self.memory[block_table[i // size]][i % size] for i in range(num_tokens)]

    def guess(self, piece: Slice) -> tuple[int, ...]:
        """As scheduler.plan.Proposal asks. What it goes on from must be the KV of exactly these known tokens."""
        asked, size, table = piece.proposal, self.block_tokens, piece.block_table
        assert asked is not None
        before = [self.draft_memory[table[i // size]][i % size] for i in range(asked.start)]
        assert before == self.read(table, asked.start), "the draft model's KV is not that of the sequence"
        assert asked.token_ids
        assert asked.num_tokens == 0 or asked.start + len(asked.token_ids) == piece.start + 1
        self.caught_up += len(asked.token_ids)
        state, pending, guesses, position = state_after(before), list(asked.token_ids), [], asked.start
        while pending:
            entry = mix(state, pending.pop(0))
            self.draft_memory[table[position // size]][position % size] = entry
            state, position = mix(state, entry), position + 1
            if not pending and len(guesses) < asked.num_tokens:
                assert piece.draw is not None
                output_tokens = piece.draw.position - piece.draw.prompt_tokens + len(guesses)
                right = next_token(state, piece.draw.params, output_tokens)
                guesses.append(right if mix(state, 77) % 4 else (right + 1) % VOCAB)
                if len(guesses) < asked.num_tokens:  # the last is not computed
                    pending.append(guesses[-1])
        self.guessed += len(guesses)
        return tuple(guesses)

    def write(self, block_table: Tokens[int], first: int, entries: Tokens[int]) -> None:
        for position, entry in enumerate(entries, first):
            self.memory[block_table[position // self.block_tokens]][position % self.block_tokens] = entry

    def execute(self, plan: StepPlan) -> StepResult:
        drawn: list[tuple[Drawn, ...]] = []
        scored: list[tuple[TokenLogprobs, ...]] = []
        written: set[tuple[int, int]] = set()
        for piece in plan.slices:
            end = piece.start + len(piece.token_ids)
            assert piece.token_ids
            assert len(piece.block_table) == -(-(piece.start + piece.num_tokens) // self.block_tokens)
            guesses = piece.guessed_token_ids if piece.proposal is None else self.guess(piece)
            assert len(guesses) == piece.num_guesses
            state, scores, states = state_after(self.read(piece.block_table, piece.start)), [], []
            for i, token_id in enumerate((*piece.token_ids, *guesses)):
                position = piece.start + i
                slot = (piece.block_table[position // self.block_tokens], position % self.block_tokens)
                assert slot not in written, "two sequences of a step write one slot"
                written.add(slot)
                entry = mix(state, token_id + VOCAB * zlib.crc32(piece.adapter.encode()))
                self.memory[slot[0]][slot[1]] = entry
                state = mix(state, entry)
                states.append(state)
                if i < len(piece.prompt_targets):
                    scores.append(score(state, piece.prompt_targets[i]))
            scored.append(tuple(scores))
            drawn.append(())
            if piece.draw is not None:
                assert piece.draw.position == end
                if piece.draw.params.has_penalties:
                    assert len(piece.draw.history) == end
                    assert kv_of(piece.draw.history) == self.read(piece.block_table, end)
                output_tokens = piece.draw.position - piece.draw.prompt_tokens
                for i, state in enumerate(states[len(piece.token_ids) - 1 :]):
                    drawn[-1] += (Drawn(next_token(state, piece.draw.params, output_tokens + i)),)
                    if drawn[-1][-1].token_id != [*guesses, -1][i]:
                        break
        return StepResult(tuple(drawn), tuple(scored))


def assert_empty(scheduler: Scheduler) -> None:
    """Promise P3."""
    scheduler.check()
    scheduler.pool.check({})
    assert set(scheduler.counts().values()) == {0}, scheduler.counts()
    assert scheduler.load().waiting_tokens == 0
    assert scheduler.pool.available == scheduler.pool.num_blocks


@pytest.fixture(scope="session")
def fake() -> SimpleNamespace:
    return SimpleNamespace(
        Engine=FakeEngine,
        answer=answer,
        assert_empty=assert_empty,
        kv_of=kv_of,
        prompt_scores=prompt_scores,
        vocab=VOCAB,
    )
