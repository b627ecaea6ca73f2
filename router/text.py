"""Tokens to text as they come: whole characters only, and never a piece of a stop string.

The text given out behind token k depends on tokens 0..k alone, not on how they were grouped; so a stream that goes on
in another router (fed the same tokens first) gives out the same text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class TextStream(Protocol):
    """service.tokenizer's incremental decoder."""

    def push(self, token_ids: Iterable[int]) -> str:
        """The characters that are whole with these tokens."""
        ...

    def finish(self) -> str:
        """What is left: a character that never became whole."""
        ...


class StopBuffer:
    """Holds text back for as long as it may be the beginning of a stop string.

    The stop string that is complete first ends the text, the longest one if several are at once: an order that does not
    depend on where the pieces of text are cut.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """(text to give out, the stop string found or "")."""
        if not self._stops:
            return text, ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            _, at, stop = min(found)
            return text[:at], stop
        keep = self._beginning_of_a_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], ""

    def rest(self) -> str:
        """What was held back for a stop string that did not come."""
        rest, self._held = self._held, ""
        return rest

    def _beginning_of_a_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - length :]) for stop in self._stops):
                return length
        return 0


class AnswerText:
    """The text of one answer. After `stop_string` is set nothing more may be pushed."""

    def __init__(self, stream: TextStream, stops: Iterable[str]) -> None:
        self._stream = stream
        self._stops = StopBuffer(stops)
        self.stop_string = ""

    def push(self, token_id: int) -> str:
        """What this token adds to the text that can be given out."""
        assert not self.stop_string
        text, self.stop_string = self._stops.push(self._stream.push((token_id,)))
        return text

    def finish(self) -> str:
        """What was held back, at the end of an answer that no stop string ended. May find one after all."""
        if self.stop_string:
            return ""
        text, self.stop_string = self._stops.push(self._stream.finish())
        return text if self.stop_string else text + self._stops.rest()
