"""Inflight batching with chunked prefill: what every step computes, and who gives way when blocks run out.

    plan    1. running sequences, oldest first, get blocks for all their known tokens; the youngest are preempted for it
            2. those that owe one token (decodes), then those that owe more (chunks), within `max_step_tokens`; guesses
               at the tokens behind a decode take only what a token for every possible sequence leaves of it
            3. then the waiting, in order of arrival, while there is budget, a place and room; preempted ones first
    commit  KV that was computed becomes prefix content, tokens that were drawn become known, what is finished ends

A plan is out until it is committed; several may be, on their way through pipeline stages, and are committed in order.
Of `steps_out` plans each takes its share of the sequences. A sequence is in one of them at most, but for chunks of
known tokens, which follow each other: only the last draws. One caller at a time; time is an argument, on the caller's
clock. commit() is in scheduler/commit.py, who comes and goes between steps in scheduler/membership.py, and how the next
plan is made while a step is computed in scheduler/ahead.py. Request errors are raised by add() and adopt(), or come as
Failed events; everything else that goes wrong in here is an assertion.
"""

from __future__ import annotations

from scheduler.ahead import PlansAhead
from scheduler.config import Load, SchedulerConfig
from scheduler.events import Computed, Event, Failed, Finish, Preempted, Tokens
from scheduler.lifetime import Stage
from scheduler.plan import Slice, StepPlan
from scheduler.sequence import Sequence
from scheduler.speculation import Guesser

__all__ = ["Computed", "Event", "Failed", "Finish", "Load", "Preempted", "Scheduler", "SchedulerConfig", "Tokens"]


class Scheduler(PlansAhead):
    """Owns all sequences of one worker, and with the reservations its blocks."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._turned_away = (-1, 0)  # arrival of the last in line that found too little room, and how much that was
        self._guesser = Guesser(config, self.pool, self.context_limit)

    # ---- a step ----------------------------------------------------------------------------------------------------

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step. None: nothing can be computed before something else happens."""
        budget, places = self.config.max_step_tokens, self._share()
        self._guesser.begin_step()
        spare = budget - self.config.max_sequences
        chosen: list[Sequence] = []
        slices: list[Slice] = []
        for sequence in _decodes_first(self._secure_blocks()):
            if budget == 0 or len(slices) == places:
                break
            taken = self._take(sequence, budget, spare, chosen, slices)
            budget, spare = budget - taken, spare - taken + 1
        while budget and len(slices) < places and (admitted := self._admit()) is not None:
            budget -= self._take(admitted, budget, 0, chosen, slices)
        if not slices:
            return None
        for sequence in chosen:
            if sequence.started_s is None:
                sequence.started_s = now_s
        return self._send_out(slices, chosen)

    def _share(self) -> int:
        """Sequences of one of `steps_out` plans, so that those which follow have as many. Who found no room in the last
        plan is not counted on."""
        running, most = len(self._roster.running), self.config.max_sequences
        if self.config.steps_out == 1:
            return most
        coming = 0 if self._short_of_blocks and running else len(self._roster.waiting)
        return -(-min(running + coming, most) // self.config.steps_out)

    def _take(self, sequence: Sequence, budget: int, spare: int, chosen: list[Sequence], slices: list[Slice]) -> int:
        """`spare`: tokens of the budget that may be guesses."""
        guesses: tuple[int, ...] = ()
        proposal = None
        if sequence.params.speculation is not None and _is_decode(sequence):
            room = 0 if self._short_of_blocks else self._room()
            guesses, proposal = self._guesser.guess(sequence, spare, room)
        piece = sequence.slice(min(sequence.unplanned_tokens, budget), self.config.block_tokens, guesses, proposal)
        slices.append(piece)
        chosen.append(sequence)
        sequence.in_flight += 1
        sequence.planned_tokens += len(piece.token_ids)
        return piece.num_tokens

    def _secure_blocks(self) -> list[Sequence]:
        """The oldest running sequences that can be planned; each holds blocks for all its known tokens."""
        self._short_of_blocks = False
        ready: list[Sequence] = []
        for sequence in self._roster.running[: self.config.max_sequences]:
            if sequence.unplanned_tokens == 0 or sequence.stage is not Stage.RUNNING:  # preempted a moment ago
                continue
            if self._grow(sequence):
                ready.append(sequence)
            else:
                self._short_of_blocks = True
        return ready

    def _grow(self, sequence: Sequence) -> bool:
        """Younger sequences give way, older ones do not: so the oldest always gets on."""
        missing = self.pool.blocks_for(sequence.known_tokens) - len(sequence.block_table)
        if missing <= 0:
            return True
        while self.pool.available < missing:
            if (victim := self._roster.youngest_behind(sequence)) is None:
                return False
            self._preempt(victim)
        sequence.block_table += self.pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the front of the line with nothing computed; what it has published may still be found there."""
        self.pool.release(sequence.forget_blocks())
        sequence.preemptions += 1
        self._roster.move(sequence, Stage.PREEMPTED)
        self._short_of_blocks = True
        self._totals["preemptions"] += 1
        self._untold.append(Preempted(sequence.sequence_id))

    def _admit(self) -> Sequence | None:
        """The first in line starts to run, if there is a place, and room for all its known tokens."""
        roster = self._roster
        if not roster.waiting or self._short_of_blocks or len(roster.running) >= self.config.max_sequences:
            return None
        sequence, room = roster.waiting[0], self._room()
        if room <= 0 or (sequence.arrival == self._turned_away[0] and room <= self._turned_away[1]):
            self._short_of_blocks = True  # no need to look its prefix up again
            return None
        shared = self._known_prefix(sequence)
        missing = self.pool.blocks_for(sequence.known_tokens) - len(shared)
        if missing > self._room():
            self.pool.release(shared)
            self._turned_away = (sequence.arrival, room)
            self._short_of_blocks = True
            return None
        self._turned_away = (-1, 0)
        roster.move(sequence, Stage.RUNNING)
        sequence.block_table = shared + self.pool.allocate(missing)
        sequence.computed_tokens = sequence.planned_tokens = len(shared) * self.config.block_tokens
        sequence.published_blocks = len(shared)
        if sequence.preemptions == 0:
            sequence.cached_tokens = sequence.computed_tokens
        self._totals["cached_tokens"] += sequence.computed_tokens
        return sequence

    def _known_prefix(self, sequence: Sequence) -> list[int]:
        """Blocks that hold its prefix, a reference on each. Log-probabilities of the prompt need all of it computed."""
        if sequence.wants_prompt_logprobs or not self.prefix.enabled:
            return []
        known = sequence.tokens(0, sequence.known_tokens)
        fresh = known[len(sequence.block_hashes) * self.config.block_tokens :]
        self.prefix.extend(sequence.block_hashes, fresh, sequence.adapter)
        return self.prefix.match(known, sequence.block_hashes)

    def _room(self) -> int:
        """Blocks for one who is not running yet: a quarter block for each who runs is left to grow into."""
        return self.pool.available - -(-len(self._roster.running) // 4)

    def spare_blocks(self) -> int:
        """Blocks that a reservation may take: none while a sequence here waits for some."""
        if self._short_of_blocks and (self._roster.waiting or self._roster.running):
            return 0
        return max(self._room(), 0)


def _decodes_first(ready: list[Sequence]) -> list[Sequence]:
    decodes = [sequence for sequence in ready if sequence.unplanned_tokens == 1]
    return decodes if len(decodes) == len(ready) else decodes + [s for s in ready if s.unplanned_tokens > 1]


def _is_decode(sequence: Sequence) -> bool:
    return sequence.unplanned_tokens == 1 and not sequence.in_flight and bool(sequence.output_token_ids)
