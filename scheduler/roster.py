"""Who is on this worker: every sequence that has not ended, in the lines that it stands in.

waiting   preempted ones first, then new ones, each in order of arrival
running   in order of arrival
due       by deadline; a held or leaving sequence has none
"""

from __future__ import annotations

import bisect
import collections
import heapq
from collections.abc import Iterator

from scheduler.lifetime import Stage
from scheduler.sequence import Sequence


class Roster:
    """Keeps the lines in step with the stages: who moves a sequence moves it here. Knows no blocks."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.waiting_tokens = 0  # owed by those in the waiting line
        self._by_id: dict[str, Sequence] = {}
        self._deadlines: list[tuple[float, int, str]] = []  # heap of (deadline, arrival, id); may name ended ones
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def get(self, sequence_id: str) -> Sequence | None:
        return self._by_id.get(sequence_id)

    def enter(self, sequence: Sequence, to: Stage, now_s: float) -> None:
        """A new one, `to` WAITING or RUNNING."""
        sequence.arrival, sequence.queued_s = self._arrivals, now_s
        self._arrivals += 1
        self._by_id[sequence.sequence_id] = sequence
        heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.arrival, sequence.sequence_id))
        self.move(sequence, to)

    def move(self, sequence: Sequence, to: Stage) -> None:
        """Out of the line of its stage, into that of `to`."""
        self._leave_line(sequence)
        clock_stood = sequence.stage is Stage.HELD
        sequence.advance(to)
        if clock_stood and to is not Stage.ENDED:
            heapq.heappush(self._deadlines, (sequence.deadline_s, sequence.arrival, sequence.sequence_id))
            self._sweep_deadlines()
        if to in (Stage.WAITING, Stage.PREEMPTED):
            bisect.insort(self.waiting, sequence, key=_place_in_line)
            self.waiting_tokens += sequence.owed_tokens
        elif to is Stage.RUNNING:
            bisect.insort(self.running, sequence, key=_arrival)
        elif to is Stage.ENDED:
            del self._by_id[sequence.sequence_id]
            self._sweep_deadlines()

    def _leave_line(self, sequence: Sequence) -> None:
        if sequence.stage in (Stage.WAITING, Stage.PREEMPTED):
            at = bisect.bisect_left(self.waiting, _place_in_line(sequence), key=_place_in_line)
            left = self.waiting.pop(at)
            self.waiting_tokens -= sequence.owed_tokens
            assert left is sequence
        elif sequence.stage is Stage.RUNNING:
            at = bisect.bisect_left(self.running, sequence.arrival, key=_arrival)
            left = self.running.pop(at)
            assert left is sequence

    def youngest_behind(self, sequence: Sequence) -> Sequence | None:
        """The youngest running sequence that arrived after this one and that no step is writing."""
        for other in reversed(self.running):
            if other.arrival <= sequence.arrival:
                return None
            if not other.in_flight:
                return other
        return None

    def pop_due(self, now_s: float) -> Sequence | None:
        """One whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now_s:
            if (sequence := self._due(heapq.heappop(self._deadlines))) is not None:
                return sequence
        return None

    def next_deadline_s(self) -> float | None:
        while self._deadlines and self._due(self._deadlines[0]) is None:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _due(self, entry: tuple[float, int, str]) -> Sequence | None:
        sequence = self._by_id.get(entry[2])
        if sequence is None or sequence.arrival != entry[1] or sequence.stage in (Stage.HELD, Stage.LEAVING):
            return None
        return sequence

    def _sweep_deadlines(self) -> None:
        """Ended sequences, and second entries of others, leave the heap at the latest when they are most of it."""
        if len(self._deadlines) > 2 * len(self._by_id) + 64:
            self._deadlines = [entry for entry in set(self._deadlines) if self._due(entry) is not None]
            heapq.heapify(self._deadlines)

    def check(self) -> None:
        """Asserts that lines and stages agree."""
        by_stage: dict[Stage, set[str]] = collections.defaultdict(set)
        for sequence_id, sequence in self._by_id.items():
            assert sequence_id == sequence.sequence_id
            by_stage[sequence.stage].add(sequence_id)
        assert not by_stage[Stage.NEW] | by_stage[Stage.ENDED]
        assert {sequence.sequence_id for sequence in self.running} == by_stage[Stage.RUNNING]
        in_line = by_stage[Stage.WAITING] | by_stage[Stage.PREEMPTED]
        assert {sequence.sequence_id for sequence in self.waiting} == in_line
        assert self.running == sorted(self.running, key=_arrival)
        assert self.waiting == sorted(self.waiting, key=_place_in_line)
        assert self.waiting_tokens == sum(sequence.owed_tokens for sequence in self.waiting)
        with_deadline = {sequence_id for _, _, sequence_id in self._deadlines}
        assert in_line | by_stage[Stage.RUNNING] <= with_deadline
        assert len(self._deadlines) <= 3 * len(self._by_id) + 65


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _place_in_line(sequence: Sequence) -> tuple[bool, int]:
    return (sequence.stage is not Stage.PREEMPTED, sequence.arrival)
