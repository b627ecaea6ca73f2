"""Teacher-forced answers through a cluster, against the log-probabilities of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
from cluster import Cluster
from tiny_llama import reference_of

RELATIVE = 1e-4


def assert_same_distribution(found: np.ndarray, expected: np.ndarray) -> None:
    """Log-probabilities [rows, vocab], relative to the largest magnitude of the row."""
    scale = np.abs(expected).max(axis=1, keepdims=True)
    worst = (np.abs(found - expected) / scale).max()
    assert worst < RELATIVE, f"relative difference {worst:.2e}"


def rows_of(entries: Any, vocab_size: int) -> np.ndarray:
    rows = np.full((len(entries), vocab_size), np.nan)
    for row, entry in zip(rows, entries, strict=True):
        for token_id, logprob in entry.top.items():
            row[token_id] = logprob
    assert not np.isnan(rows).any(), "the whole vocabulary was asked for"
    return rows


async def check_forced(running: Cluster, model: Any, vocab_size: int, prompt: list[int], answer: list[int]) -> None:
    found = await running.client.generate(
        prompt,
        forced_token_ids=answer,
        max_tokens=len(answer),
        ignore_eos=True,
        temperature=0.0,
        logprobs=vocab_size,
        timeout_s=100,
    )
    assert list(found.token_ids) == answer
    expected = reference_of(model, prompt + answer)[len(prompt) - 1 : -1]
    assert_same_distribution(rows_of(found.logprobs, vocab_size), expected)
