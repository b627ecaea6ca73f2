"""Who may write to a peer next, where several hand-overs share the link to it. Pure: no clock, no lock.

Bytes in flight are bounded, for the link and for each hand-over: a receiver or a link that is slow holds up those who
ask, and what is asked for waits where it lies. Who waits is served by weighted fair queueing (Demers, Keshav, Shenker
1989): each is charged bytes · slack, slack being the time that is left to its deadline, and the least charged is next.
Hand-overs with equal deadlines take turns by bytes; one with half the time left has twice the share, and none starves.
"""

from __future__ import annotations

import collections
import dataclasses

LEAST_SLACK_S = 0.001


@dataclasses.dataclass(slots=True)
class _Waiting:
    nbytes: int
    finish: float  # virtual time at which it would be through


class LinkQueue:
    """Of one link. A hand-over asks for one write at a time, under its name."""

    def __init__(self, window_bytes: int, handoff_bytes: int) -> None:
        """In flight at once: on the link, and of one hand-over. One write that is larger goes when nothing else is."""
        self._window_bytes, self._handoff_bytes = window_bytes, handoff_bytes
        self._waiting: dict[str, _Waiting] = {}
        self._charged: dict[str, float] = {}  # virtual finish of the last write that each was let, while it is known
        self._in_flight: collections.Counter[str] = collections.Counter()
        self._now = 0.0  # virtual: start of the last write that was let

    def ask(self, name: str, nbytes: int, slack_s: float) -> None:
        assert name not in self._waiting, "one at a time"
        start = max(self._now, self._charged.get(name, 0.0))
        self._waiting[name] = _Waiting(nbytes, start + nbytes * max(slack_s, LEAST_SLACK_S))

    def withdraw(self, name: str) -> None:
        self._waiting.pop(name, None)

    def next(self) -> str | None:
        """Lets one who waits write. None: nobody does, or what is in flight must land first."""
        able = [name for name, each in self._waiting.items() if self._fits(self._in_flight[name], each.nbytes)]
        if not able:
            return None
        name = min(able, key=lambda each: self._waiting[each].finish)
        nbytes, total = self._waiting[name].nbytes, self._in_flight.total()
        if total and total + nbytes > self._window_bytes:
            return None  # nor may a smaller one pass it
        let = self._waiting.pop(name)
        self._now = max(self._now, self._charged.get(name, 0.0))
        self._charged[name] = let.finish
        self._in_flight[name] += nbytes
        return name

    def _fits(self, in_flight_bytes: int, nbytes: int) -> bool:
        return not in_flight_bytes or in_flight_bytes + nbytes <= self._handoff_bytes

    def landed(self, name: str, nbytes: int) -> None:
        """Or is given up: it is in flight no more."""
        self._in_flight[name] -= nbytes
        assert self._in_flight[name] >= 0

    def forget(self, name: str) -> None:
        """The hand-over is over; nothing of it is in flight."""
        assert not self._in_flight[name]
        self.withdraw(name)
        del self._in_flight[name]
        self._charged.pop(name, None)

    @property
    def in_flight_bytes(self) -> int:
        return self._in_flight.total()
