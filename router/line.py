"""The router's line: first come, first served, and bounded. Only who stands first may place a request.

A request that lost its worker comes back with the arrival number it had, so it stands where it stood before.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
from collections.abc import Iterator

from spec.errors import Overloaded


class Place:
    """One request's place in the line."""

    def __init__(self, line: Line, arrival: int) -> None:
        self.arrival = arrival
        self.called = asyncio.Event()
        self._line = line

    async def first(self) -> None:
        """Until nobody who arrived earlier stands in the line. Ask again after every wait: one may have come back."""
        while not self._line.is_first(self):
            self.called.clear()
            await self.called.wait()


class Line:
    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._arrivals = itertools.count()
        self._waiting = 0
        self._places: list[Place] = []  # by arrival

    def __len__(self) -> int:
        """Requests that wait to be placed, those included that ask a decode worker for blocks just now."""
        return self._waiting

    def arrive(self) -> int:
        """The number that a request keeps for its whole life. Raises Overloaded when the line is full."""
        self._check_room()
        return next(self._arrivals)

    @contextlib.contextmanager
    def wait(self, *, was_placed: bool) -> Iterator[None]:
        """Counts the request as waiting. Raises Overloaded when the line is full; one that was placed comes back in."""
        if not was_placed:
            self._check_room()
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def _check_room(self) -> None:
        if self._waiting >= self._max_waiting:
            raise Overloaded(f"{self._waiting} requests are waiting already, the most that may")

    @contextlib.contextmanager
    def stand(self, arrival: int) -> Iterator[Place]:
        place = Place(self, arrival)
        bisect.insort(self._places, place, key=lambda other: other.arrival)
        try:
            yield place
        finally:
            self._places.remove(place)
            if self._places:
                self._places[0].called.set()

    def is_first(self, place: Place) -> bool:
        return self._places[0] is place
