"""The next plan while a step is computed, for the common case: everybody in it draws one token and goes on.

    plan_ahead  while step n is computed: all of plan n + 1 but the tokens that n draws, and blocks for them
    follow      when they are drawn: plan n + 1, if plan() would make the same one behind the commit of n
    commit      of n, then, while n + 1 is computed

What is made ahead is frozen data and nothing is changed for it: to drop it is to forget it. Whether it holds is never
remembered, it is compared with what is. Where somebody ends, comes, has gone, is to be held, or lacks a block, follow()
changes nothing and says None, and n is committed and n + 1 planned as if nothing had been made ahead.

Nothing is made where somebody is known to end with step n (by length, or for a hand-over), guesses, is constrained or
has penalties.

Between follow() and commit() two steps that draw are out for each sequence. Others may come in between (a request, an
abort, a hand-over); the one who plans must not.
"""

from __future__ import annotations

import dataclasses

from scheduler.commit import Commits
from scheduler.config import SchedulerConfig
from scheduler.plan import NO_TOKEN, Draw, Drawn, Slice, StepPlan, StepResult
from scheduler.sequence import Sequence


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AheadPlan:
    """What follows on `after` if everybody in that goes on."""

    after: StepPlan
    sequences: tuple[Sequence, ...]  # of both plans, in their order
    slices: tuple[Slice, ...]  # the token of each is NO_TOKEN, and a table may lack its last block
    missing_blocks: int  # so many tables do


class PlansAhead(Commits):
    """The part of a Scheduler that plans while a step is computed."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._short_of_blocks = False  # the last plan left somebody without

    def plan_ahead(self) -> AheadPlan | None:
        """Call it while one plan is out. None: what follows on that is not known before its result is."""
        if self.config.steps_out > 1 or len(self._flights) != 1:
            return None
        ((plan, sequences),) = self._flights.values()
        if not self._is_all(sequences):
            return None
        slices, missing, size = [], 0, self.config.block_tokens
        for piece, sequence in zip(plan.slices, sequences, strict=True):
            known = sequence.known_tokens
            if piece.draw is None or not self._may_go_on(sequence):
                return None
            table = sequence.table()
            missing += known + 1 > len(table) * size
            draw = Draw(sequence.params, known + 1, len(sequence.prompt_token_ids), ())
            slices.append(Slice(sequence.sequence_id, (NO_TOKEN,), known, table, draw, adapter=sequence.adapter))
        return AheadPlan(plan, sequences, tuple(slices), missing)

    def _is_all(self, sequences: tuple[Sequence, ...]) -> bool:
        """These are all who run, and nobody can join them."""
        running, most = self._roster.running, self.config.max_sequences
        return (not self._roster.waiting or len(running) == most) and running == list(sequences)

    def _may_go_on(self, sequence: Sequence) -> bool:
        """With a token more it is one decode that depends on nothing else of it."""
        params = sequence.params
        is_plain = params.speculation is None and params.constraint is None and not params.needs_history
        if not is_plain or not sequence.has_room_behind(1, self.context_limit):
            return False
        return not _is_to_be_held(sequence)

    def follow(self, ahead: AheadPlan, result: StepResult, now_s: float) -> StepPlan | None:
        """`result`: of the step that it was made behind. The plan is out then, and that step to be committed before
        the next plan is made. None: nothing has changed, commit and plan."""
        if not self._holds(ahead, result, now_s):
            return None
        before = zip(ahead.sequences, ahead.after.slices, strict=True)
        for sequence, piece in before:  # before a block is taken: it might be one of equal content
            self._publish(sequence, piece.start + len(piece.token_ids))
        self._short_of_blocks = False
        slices, size = [], self.config.block_tokens
        for sequence, piece, (drawn,) in zip(ahead.sequences, ahead.slices, result.drawn, strict=True):
            table, start = piece.block_table, piece.start
            if start == len(table) * size:
                sequence.block_table += self.pool.allocate(1)
                table = sequence.table()
            sequence.in_flight += 1
            sequence.planned_tokens = start + 1
            slices.append(Slice(piece.sequence_id, (drawn.token_id,), start, table, piece.draw, adapter=piece.adapter))
        return self._send_out(slices, ahead.sequences, ahead.slices)

    def _holds(self, ahead: AheadPlan, result: StepResult, now_s: float) -> bool:
        (flight,) = self._flights.values()
        assert flight[0] is ahead.after
        due_s = self.next_deadline_s()
        return (
            self._is_all(ahead.sequences)
            and ahead.missing_blocks <= self.pool.available
            and (due_s is None or due_s > now_s)
            and all(map(self._goes_on, ahead.sequences, result.drawn))
        )

    def _goes_on(self, sequence: Sequence, drawn: tuple[Drawn, ...]) -> bool:
        token_id = drawn[0].token_id
        if token_id == NO_TOKEN or sequence.stops_at(token_id, self.config.eos_token_ids):
            return False
        return not _is_to_be_held(sequence)


def _is_to_be_held(sequence: Sequence) -> bool:
    """With the next token."""
    return sequence.draws_here is not None and sequence.drawn_here + 1 >= sequence.draws_here
