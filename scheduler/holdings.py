"""What a worker holds (sequences, blocks, steps that are out) and how it is counted. Decides nothing."""

from __future__ import annotations

import collections

from scheduler.blocks import BlockPool, count_references
from scheduler.config import Load, SchedulerConfig
from scheduler.events import Event
from scheduler.plan import StepPlan
from scheduler.prefix import PrefixCache
from scheduler.roster import Roster
from scheduler.sequence import Sequence


class Holdings:
    """The state under a Scheduler; only that writes it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_tokens)
        self.prefix = PrefixCache(self.pool, config.cache_salt, enabled=config.prefix_caching)
        self._roster = Roster()
        self._flights: dict[int, tuple[StepPlan, tuple[Sequence, ...]]] = {}  # steps that are not committed
        self._early: dict[Sequence, list[Event]] = {}  # whose part of the step that is committed next is taken over
        self._totals: collections.Counter[str] = collections.Counter()

    def has(self, sequence_id: str) -> bool:
        """It is here and has not ended."""
        return self._roster.get(sequence_id) is not None

    def sequence(self, sequence_id: str) -> Sequence | None:
        """To be read; None: it is not here (any more)."""
        return self._roster.get(sequence_id)

    def load(self) -> Load:
        waiting, running = self._roster.waiting, self._roster.running
        return Load(
            waiting=len(waiting),
            running=len(running),
            held=len(self._roster) - len(waiting) - len(running),
            waiting_tokens=self._roster.waiting_tokens + sum(sequence.owed_tokens for sequence in running),
            free_blocks=self.pool.available,
            total_blocks=self.pool.num_blocks,
        )

    def counts(self) -> dict[str, int]:
        """What must be zero when nothing runs (P3). `held_blocks` are those of the whole pool, whoever holds them."""
        return {
            "sequences": len(self._roster),
            "waiting": len(self._roster.waiting),
            "running": len(self._roster.running),
            "steps_in_flight": len(self._flights),
            "held_blocks": self.pool.num_held,
        }

    def totals(self) -> dict[str, int]:
        """What only grows."""
        work = ("steps", "computed_tokens", "generated_tokens", "cached_tokens", "preemptions", "adopted")
        guesses = ("proposed_tokens", "accepted_tokens")
        ends = ("finished", "failed", "aborted", "expired")
        return {name: self._totals[name] for name in (*work, *guesses, *ends)} | {"evictions": self.pool.evictions}

    def references(self) -> collections.Counter[int]:
        """References on blocks that sequences here hold."""
        return count_references(sequence.block_table for sequence in self._roster)

    def check(self) -> None:
        """Asserts the invariants. O(everything): for tests and for a look at a running worker."""
        self.pool.check()
        self._roster.check()
        assert all(self.pool.references(block) >= count for block, count in self.references().items())
        for sequence in self._roster:
            assert sequence.computed_tokens < sequence.known_tokens
            undrawn = sequence.in_flight > 1  # of a step whose result is there and that is not committed; see ahead.py
            assert sequence.computed_tokens <= sequence.planned_tokens <= sequence.known_tokens + undrawn
            assert sequence.in_flight or sequence.computed_tokens == sequence.planned_tokens
            assert len(sequence.block_table) >= self.pool.blocks_for(sequence.computed_tokens)
        assert not any(sequence.block_table for sequence in self._roster.waiting)
        out = (each for _, sequences in self._flights.values() for each in sequences if each not in self._early)
        flying = collections.Counter(map(id, out))
        assert flying == {id(sequence): sequence.in_flight for sequence in self._roster if sequence.in_flight}
