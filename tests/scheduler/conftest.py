"""An engine of a few lines whose every token depends on every KV entry before it, read through the block table.

A wrong, stale or missing block anywhere in a context changes all that is drawn after it, so tokens that are right prove
that every block was. The oracle computes the same function of the tokens alone, without blocks, batches or chunks.
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from types import SimpleNamespace

import pytest

from scheduler.batch import Scheduler
from scheduler.plan import Drawn, StepPlan, StepResult, TokenLogprobs
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
    """KV memory: `memory[block][slot]`, one integer per token."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.memory = [[-1] * block_tokens for _ in range(num_blocks)]

    def read(self, block_table: Tokens[int], num_tokens: int) -> list[int]:
        size = self.block_tokens
        return [self.memory[block_table[i // size]][i % size] for i in range(num_tokens)]

    def write(self, block_table: Tokens[int], first: int, entries: Tokens[int]) -> None:
        for position, entry in enumerate(entries, first):
            self.memory[block_table[position // self.block_tokens]][position % self.block_tokens] = entry

    def execute(self, plan: StepPlan) -> StepResult:
        drawn: list[Drawn | None] = []
        scored: list[tuple[TokenLogprobs, ...]] = []
        written: set[tuple[int, int]] = set()
        for piece in plan.slices:
            end = piece.start + len(piece.token_ids)
            assert piece.token_ids
            assert len(piece.block_table) == -(-end // self.block_tokens)
            state, scores = state_after(self.read(piece.block_table, piece.start)), []
            for i, token_id in enumerate(piece.token_ids):
                position = piece.start + i
                slot = (piece.block_table[position // self.block_tokens], position % self.block_tokens)
                assert slot not in written, "two sequences of a step write one slot"
                written.add(slot)
                entry = mix(state, token_id)
                self.memory[slot[0]][slot[1]] = entry
                state = mix(state, entry)
                if i < len(piece.prompt_targets):
                    scores.append(score(state, piece.prompt_targets[i]))
            scored.append(tuple(scores))
            drawn.append(None)
            if piece.draw is not None:
                assert piece.draw.position == end
                if piece.draw.params.has_penalties:
                    assert len(piece.draw.history) == end
                    assert kv_of(piece.draw.history) == self.read(piece.block_table, end)
                output_tokens = piece.draw.position - piece.draw.prompt_tokens
                drawn[-1] = Drawn(next_token(state, piece.draw.params, output_tokens))
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
