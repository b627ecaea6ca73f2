"""A step's inputs on the host: one pass over the slices, then whole arrays.

Nearly all of it follows from where the sequences are and where their blocks lie, which is known while the step before
is computed. The tokens, and the blocks that are taken with them, come last.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from scheduler.plan import Slice


class HostInputs:
    """T tokens of S slices, one after the other. After complete() it is whole; see engine/step.py for the shapes."""

    def __init__(self, slices: Sequence[Slice], block_tokens: int) -> None:
        """A block table may lack the last block of its slice, and no token is looked at."""
        num_slices = len(slices)
        counts = [len(piece.token_ids) + len(piece.guessed_token_ids) for piece in slices]
        starts = [piece.start for piece in slices]
        self._block_tokens = block_tokens
        self._counts = np.asarray(counts, np.int64)
        self._ends = self._counts + np.asarray(starts, np.int64)
        assert self._counts.min() > 0
        self.context_lens = self._ends.astype(np.int32)  # [S]
        self.query_starts = np.zeros(num_slices + 1, np.int32)
        np.cumsum(self._counts, out=self.query_starts[1:])
        self.num_tokens = int(self.query_starts[-1])
        widths = [-(-(start + count) // block_tokens) for start, count in zip(starts, counts, strict=True)]
        self.block_tables = np.zeros((num_slices, max(widths)), np.int32)  # [S, M]
        self._lacking: list[tuple[int, int]] = []  # slices without their last block, and its place
        for row, (piece, width) in enumerate(zip(slices, widths, strict=True)):
            table = piece.block_table
            if len(table) < width:
                assert len(table) == width - 1
                self._lacking.append((row, width - 1))
            self.block_tables[row, : min(width, len(table))] = table[:width]
        self.slice_of = np.repeat(np.arange(num_slices), self._counts)  # [T]
        offsets = np.asarray(starts, np.int64) - self.query_starts[:-1]
        self.positions = np.arange(self.num_tokens) + offsets[self.slice_of]  # [T] int64
        self.token_ids = np.zeros(self.num_tokens, np.int64)
        self.slots = self._slots()

    def _slots(self) -> np.ndarray:
        blocks = self.block_tables[self.slice_of, self.positions // self._block_tokens].astype(np.int64)
        slots: np.ndarray = blocks * self._block_tokens + self.positions % self._block_tokens
        return slots

    def complete(self, slices: Sequence[Slice], num_blocks: int, vocab_size: int, max_context_tokens: int) -> None:
        """With the tokens, and the last blocks where they were lacking."""
        tokens = itertools.chain.from_iterable((*piece.token_ids, *piece.guessed_token_ids) for piece in slices)
        self.token_ids[:] = np.fromiter(tokens, np.int64, self.num_tokens)
        for row, last in self._lacking:
            assert len(slices[row].block_table) > last
            self.block_tables[row, last] = slices[row].block_table[last]
        if self._lacking:
            self.slots = self._slots()
        assert self._ends.max() <= max_context_tokens
        assert self.block_tables.min() >= 0
        assert self.block_tables.max() < num_blocks
        assert self.token_ids.min() >= 0
        assert self.token_ids.max() < vocab_size


def targets_of(piece: Slice) -> tuple[int, ...]:
    """Prompt tokens whose log-probabilities are asked for."""
    return () if piece.prompt_logprobs is None else piece.prompt_targets


def wanted_rows(slices: tuple[Slice, ...]) -> tuple[list[int] | None, int]:
    """Rows of the step that go through the head: first those that draw, guesses too, then those whose prompt
    log-probabilities are asked for. (None, n) when these are all n rows in order, as in a step of decodes alone."""
    drawing: list[int] = []
    prompt: list[int] = []
    row = 0
    for piece in slices:
        if targets_of(piece):
            prompt.extend(range(row, row + len(piece.prompt_targets)))
        last_known = row + len(piece.token_ids) - 1
        row = last_known + 1 + len(piece.guessed_token_ids)
        if piece.draw is not None:
            drawing.extend(range(last_known, row))
    if not prompt and len(drawing) == row:
        return None, row
    return drawing + prompt, len(drawing)
