"""Drives an Engine as a scheduler would, with blocks in scrambled order, and compares what comes out with an oracle."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from engine.engine import Engine
from scheduler.plan import Draw, Slice, StepPlan, StepResult, TokenLogprobs
from spec.sampling import SamplingParams


@dataclasses.dataclass
class Running:
    name: str
    token_ids: list[int]  # teacher-forced: the engine's draws are looked at, not followed
    blocks: tuple[int, ...]
    num_prompt: int  # after these, a step computes one token, as a decode does
    computed: int = 0
    adapter: str = ""
    logprobs: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)  # row -> [vocab]


class Stepper:
    """Asks for the whole vocabulary's log-probabilities after every token, through draws and through prompt targets;
    without `prompts` through draws alone."""

    def __init__(self, engine: Engine, seed: int = 0, *, prompts: bool = True) -> None:
        self.engine, self.prompts = engine, prompts
        self.free = list(range(engine.kv.num_blocks))
        random.Random(seed).shuffle(self.free)

    def add(self, name: str, token_ids: Sequence[int], num_prompt: int | None = None) -> Running:
        count = self.engine.kv.layout.blocks_for(len(token_ids))
        blocks, self.free = tuple(self.free[:count]), self.free[count:]
        return Running(name, list(token_ids), blocks, len(token_ids) if num_prompt is None else num_prompt)

    def step(self, shares: Sequence[tuple[Running, int]]) -> StepResult:
        """Computes the next `count` tokens of each sequence in one step."""
        vocab = self.engine.spec.vocab_size
        slices = []
        for running, count in shares:
            start, end = running.computed, running.computed + count
            assert end <= running.num_prompt or count == 1
            targets = tuple(running.token_ids[start + 1 : min(end + 1, running.num_prompt)]) if self.prompts else ()
            greedy = SamplingParams(temperature=0.0, logprobs=vocab)
            last = Draw(greedy, end, running.num_prompt, ()) if end >= running.num_prompt else None
            piece = tuple(running.token_ids[start:end])
            table = running.blocks[: self.engine.kv.layout.blocks_for(end)]
            asked = vocab if targets else None
            slices.append(Slice(running.name, piece, start, table, last, asked, targets, running.adapter))
        result = self.engine.execute(StepPlan(0, tuple(slices)))
        for (running, count), drawn, prompt in zip(shares, result.drawn, result.prompt_logprobs, strict=True):
            rows = (*prompt, *(each.logprobs for each in drawn if each.logprobs is not None))
            assert len(rows) == (count if self.prompts else len(drawn))
            for offset, row in enumerate(rows, count - len(rows)):
                running.logprobs[running.computed + offset] = whole_row(row, vocab)
            running.computed += count
        return result

    def run(self, token_ids: Sequence[int], chunk: int | None = None) -> np.ndarray:
        """One sequence alone in chunks: [len(token_ids), vocab] log-probabilities."""
        running = self.add("alone", token_ids)
        while running.computed < len(running.token_ids):
            left = len(running.token_ids) - running.computed
            self.step([(running, min(chunk or left, left))])
        self.free.extend(running.blocks)
        return rows_of(running)


def whole_row(logprobs: TokenLogprobs, vocab: int) -> np.ndarray:
    row = np.full(vocab, np.nan)
    for token_id, value in logprobs.top:
        row[token_id] = value
    assert not np.isnan(row).any()
    return row


def rows_of(running: Running) -> np.ndarray:
    return np.stack([running.logprobs[row] for row in range(len(running.token_ids))])


def worst_difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Greatest difference, relative to the greatest log-probability of the row (they are logits less a constant)."""
    return float((np.abs(found - expected) / np.abs(expected).max(axis=-1, keepdims=True)).max())
