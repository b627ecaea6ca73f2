"""When a request is sent again, and after how long. Pure: time is an argument."""

from __future__ import annotations

import dataclasses
import random

from legato.errors import DeadlineExceeded, LegatoError


@dataclasses.dataclass(frozen=True, slots=True)
class Retries:
    """Sends of one request.

    A retryable error before the first token is answered by sending again; after tokens came, by sending again with
    them, so that any router goes on at the next index. `attempts` bounds the sends between which no new token came.
    Every address is tried once without waiting; then the wait doubles from `first_delay_s` up to `max_delay_s`, and up
    to half of it is left out at random, so that clients do not return all at once. A wait that would outlast the
    deadline is not begun.
    """

    attempts: int = 12  # about 11 s: a router that is started again is back by then
    first_delay_s: float = 0.1
    max_delay_s: float = 2.0


class Backoff:
    """The sends of one request."""

    def __init__(self, retries: Retries, num_addresses: int, deadline_s: float, uniform: random.Random | None = None):
        self._retries = retries
        self._num_addresses = num_addresses
        self._deadline_s = deadline_s
        self._random = uniform or random.Random()
        self._failures = 0
        self._first: LegatoError | None = None  # of the failures since a token came
        self.sends = 1

    def delay_after_s(self, error: LegatoError, now_s: float, progressed: bool) -> float:
        """Seconds to wait before the next send. Raises `error` itself where another is not safe or cannot help; it then
        says what failed first, for that is why the later sends had to be."""
        if progressed:
            self._failures, self._first = 0, None
        self._failures += 1
        if not error.retryable or isinstance(error, DeadlineExceeded) or self._failures >= self._retries.attempts:
            raise self._with_cause(error) from self._first
        rounds = self._failures - self._num_addresses
        delay_s = 0.0
        if rounds >= 0:
            delay_s = min(self._retries.max_delay_s, self._retries.first_delay_s * 2**rounds)
            delay_s *= self._random.uniform(0.5, 1.0)
        if now_s + delay_s >= self._deadline_s:
            raise self._with_cause(error) from self._first
        self._first = self._first or error
        self.sends += 1
        return delay_s

    def _with_cause(self, error: LegatoError) -> LegatoError:
        first = self._first
        if first is not None and (first.reason, first.message) != (error.reason, error.message):
            error.message += f"; first it failed because {first.message} ({first.reason})"
            error.details["first_reason"] = first.reason
        return error
