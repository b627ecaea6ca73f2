"""Which sequences a worker has: how one comes, is held for a hand-over, and goes.

What each step computes of them is in scheduler/batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.config import SchedulerConfig
from scheduler.events import Event, Failed
from scheduler.holdings import Holdings
from scheduler.lifetime import Stage
from scheduler.sequence import Sequence
from spec import errors


class Membership(Holdings):
    """The part of a Scheduler that requests, hand-overs and deadlines call between steps."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self.context_limit = min(config.max_context_tokens, config.num_blocks * config.block_tokens)
        self._untold: list[Event] = []  # told with the next commit or expire

    def add(self, sequence: Sequence, now_s: float) -> None:
        """Takes it into the waiting line. Raises ContextTooLong when it can never run here, Overloaded when the line is
        full, InvalidParameter for an empty prompt, an id that is here, or an answer that is already complete."""
        self._admissible(sequence)
        if len(self._roster.waiting) >= self.config.max_waiting:
            raise errors.Overloaded(f"{len(self._roster.waiting)} sequences are waiting already")
        self._roster.enter(sequence, Stage.WAITING, now_s)

    def adopt(self, sequence: Sequence, block_table: Iterable[int], computed_tokens: int, now_s: float) -> None:
        """Takes it into the batch with the KV of its first `computed_tokens` tokens, which is in `block_table`.

        The references on these blocks pass over, also when it raises; then they are released. Raises as add() does."""
        blocks = list(block_table)
        assert len(blocks) == self.pool.blocks_for(computed_tokens)
        try:
            self._admissible(sequence)
            if not computed_tokens < sequence.known_tokens:
                raise errors.InvalidParameter("must leave one token to compute", field="computed_tokens")
        except errors.LegatoError:
            self.pool.release(blocks)
            raise
        sequence.block_table = blocks
        sequence.computed_tokens = sequence.planned_tokens = computed_tokens
        sequence.published_blocks = computed_tokens // self.config.block_tokens  # by the reservation
        self._roster.enter(sequence, Stage.RUNNING, now_s)
        self._totals["adopted"] += 1

    def _admissible(self, sequence: Sequence) -> None:
        known = sequence.known_tokens
        if self._roster.get(sequence.sequence_id) is not None:
            raise errors.InvalidParameter(f"{sequence.sequence_id!r} runs here already", field="sequence_id")
        if not sequence.prompt_token_ids:
            raise errors.InvalidParameter("must hold at least one token", field="prompt")
        if len(sequence.output_token_ids) >= sequence.params.max_tokens:
            raise errors.InvalidParameter("hold all tokens that were asked for", field="output_token_ids")
        if known + 1 > self.context_limit:
            raise errors.ContextTooLong(
                f"and answer so far are {known} tokens, and with one more they must fit into {self.context_limit}",
                field="prompt",
            )

    def abort(self, sequence_id: str, now_s: float) -> bool:
        """Ends it without an event. False: it is not here (any more). Blocks that a step writes go at its commit."""
        sequence = self._roster.get(sequence_id)
        if sequence is None or sequence.stage is Stage.LEAVING:
            return False
        self._end(sequence)
        self._totals["aborted"] += 1
        return True

    def release(self, sequence_id: str) -> None:
        """The hand-over of a held sequence is over: its blocks are given back, and stay cached as prefix.

        A sequence that is not held is left alone, one that is not here is no error: it may have been aborted."""
        sequence = self._roster.get(sequence_id)
        if sequence is not None and sequence.stage is Stage.HELD:
            self._end(sequence)

    def take_out(self, sequence_id: str) -> bool:
        """It is to be held after the step that draws next, whose Tokens event says so. True: it is held already, for it
        had been preempted, and has no blocks. Nothing happens to one that has ended."""
        sequence = self._roster.get(sequence_id)
        if sequence is None or sequence.stage is Stage.LEAVING:
            return False
        if sequence.stage is Stage.PREEMPTED:
            self._roster.move(sequence, Stage.HELD)
        if sequence.stage is Stage.HELD:
            return True
        # Where the step that draws next is out already and the one before it is not committed, it is held after both.
        sequence.draws_here = sequence.drawn_here + 1 + max(0, sequence.planned_tokens - sequence.known_tokens)
        return False

    def put_back(self, sequence_id: str) -> None:
        """One that was to be taken out, or was, goes on as before. Nothing happens to one that has ended."""
        sequence = self._roster.get(sequence_id)
        if sequence is None:
            return
        sequence.draws_here = None
        if sequence.stage is Stage.HELD:
            self._roster.move(sequence, Stage.RUNNING if sequence.block_table else Stage.PREEMPTED)

    def expire(self, now_s: float) -> list[Event]:
        """Ends those whose deadline has passed. A held one is left alone: the hand-over has a clock of its own."""
        events, self._untold = self._untold, []
        while (sequence := self._roster.pop_due(now_s)) is not None:
            self._end(sequence)
            self._totals["expired"] += 1
            error = errors.DeadlineExceeded("the deadline of the request has passed")
            events.append(Failed(sequence.sequence_id, error))
        return events

    def next_deadline_s(self) -> float | None:
        """When expire() has something to do next."""
        return self._roster.next_deadline_s()

    def _end(self, sequence: Sequence) -> None:
        """Out of every line; its blocks go when no step writes them any more."""
        if sequence.in_flight:
            self._roster.move(sequence, Stage.LEAVING)
            return
        self._roster.move(sequence, Stage.ENDED)
        self.pool.release(sequence.forget_blocks())
