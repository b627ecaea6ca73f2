"""One request as the load generator saw it."""

from __future__ import annotations

import dataclasses

from legato.errors import LegatoError
from legato.types import Ledger, Route


@dataclasses.dataclass(slots=True)
class Record:
    """Times are seconds after the start of the load, by its monotonic clock.

    due_s       when it should have been sent: the arrival's time in an open loop, `sent_s` in a closed one
    pieces      (when it came, tokens in it) for each piece that held tokens
    ended_s     when the stream ended, well or not; None: it still ran when the load was stopped
    error       that ended it; None: it ended well, or still ran
    ledger      and route, prompt_tokens, proposed_tokens (guesses of speculation), accepted_tokens (of these, tokens of
                the answer): of the answer, as far as it came
    """

    index: int
    due_s: float
    sent_s: float
    asked_tokens: int
    pieces: list[tuple[float, int]] = dataclasses.field(default_factory=list)
    ended_s: float | None = None
    error: LegatoError | None = None
    prompt_tokens: int = 0
    proposed_tokens: int = 0
    accepted_tokens: int = 0
    ledger: Ledger | None = None
    route: Route | None = None

    @property
    def is_finished(self) -> bool:
        return self.ended_s is not None and self.error is None

    @property
    def output_tokens(self) -> int:
        return sum(tokens for _, tokens in self.pieces)

    @property
    def ttft_s(self) -> float | None:
        """From when it was due: a load generator or a server that is late makes this longer, never unseen."""
        return self.pieces[0][0] - self.due_s if self.pieces else None

    @property
    def end_to_end_s(self) -> float | None:
        return None if self.ended_s is None else self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """(last token - first token) / (tokens - 1). The first piece may hold several tokens, which all came with the
        first: those have no time of their own, and are not among the tokens that this divides by."""
        following = self.output_tokens - self.pieces[0][1] if self.pieces else 0
        return (self.pieces[-1][0] - self.pieces[0][0]) / following if following else None

    @property
    def gaps_s(self) -> list[tuple[float, int]]:
        """(time since the piece before, tokens in the piece) for each piece but the first."""
        return [
            (after_s - before_s, tokens)
            for (before_s, _), (after_s, tokens) in zip(self.pieces, self.pieces[1:], strict=False)
        ]

    @property
    def itls_s(self) -> list[float]:
        """One for each token after the first piece: a gap that brought k tokens is k times gap / k."""
        return [gap_s / tokens for gap_s, tokens in self.gaps_s for _ in range(tokens)]
