"""Guesses out of the sequence itself."""

from __future__ import annotations

from collections.abc import Sequence as Tokens


class PromptLookup:
    """What followed the last time that the newest `ngram` tokens stood in the sequence (Saxena 2023, prompt lookup
    decoding; Yang et al. 2023, arXiv:2304.04487). Grows with the sequence: a token costs one entry."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._tokens: list[int] = []
        self._continues: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token behind its latest place

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Tokens[int]) -> None:
        for token_id in token_ids:
            end = len(self._tokens)
            if end >= self._ngram:
                self._continues[tuple(self._tokens[end - self._ngram :])] = end
            self._tokens.append(token_id)

    def guess(self, num_tokens: int) -> tuple[int, ...]:
        """Empty where the n-gram is new. A copy that reaches the end goes on in itself, as in a repeating pattern."""
        if num_tokens < 1 or len(self._tokens) < self._ngram:
            return ()
        place = self._continues.get(tuple(self._tokens[len(self._tokens) - self._ngram :]))
        if place is None:
            return ()
        period = len(self._tokens) - place
        return tuple(self._tokens[place + i % period] for i in range(num_tokens))
