"""The next plan while a step is computed, for the common case: everybody in it draws one token and goes on, or is known
to leave with it, by length or for a hand-over.

    plan_ahead  while step n is computed: all of plan n + 1 but the tokens that n draws, and blocks for them
    holds       when they are drawn: whether plan() would make the same one behind the commit of n
    follow      plan n + 1, then; what n means for those who leave is taken over first, so that their blocks are free
    commit      of n, while n + 1 is computed

What is made ahead is frozen data and nothing is changed for it: to drop it is to forget it. Whether it holds is never
remembered, it is compared with what is. Where somebody ends with a token, comes, has gone, is to be held, or lacks a
block, it does not, and n is committed and n + 1 planned as if nothing had been made ahead.

Nothing is made where somebody who goes on guesses.

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
    """What follows on `after` if everybody in that goes on or leaves as it was known."""

    after: StepPlan
    sequences: tuple[Sequence, ...]  # of `after`, in its order
    stays: tuple[bool, ...]  # of these; the others leave with it
    # Of those who stay. The token of each is NO_TOKEN, its draw has no history, and a table may lack its last block.
    slices: tuple[Slice, ...]
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
        stays = tuple(not self._leaves(sequence) for sequence in sequences)
        if self._roster.waiting and not all(stays):
            return None
        for piece, sequence, goes_on in zip(plan.slices, sequences, stays, strict=True):
            known = sequence.known_tokens
            if piece.draw is None or (goes_on and sequence.params.speculation is not None):
                return None
            if not goes_on:
                continue
            table = sequence.table()
            missing += known + 1 > len(table) * size
            draw = Draw(sequence.params, known + 1, len(sequence.prompt_token_ids), ())
            slices.append(Slice(sequence.sequence_id, (NO_TOKEN,), known, table, draw, adapter=sequence.adapter))
        return AheadPlan(plan, sequences, stays, tuple(slices), missing) if slices else None

    def has_nothing_to_plan(self, now_s: float) -> bool:
        """Nobody is here for whom a step or expire() would do something."""
        due_s, roster = self.next_deadline_s(), self._roster
        nobody = not (self._flights or roster.running or roster.waiting or self._untold)
        return nobody and (due_s is None or due_s > now_s)

    def _is_all(self, sequences: tuple[Sequence, ...]) -> bool:
        """These are all who run, and nobody can join them."""
        running, most = self._roster.running, self.config.max_sequences
        return (not self._roster.waiting or len(running) == most) and running == list(sequences)

    def _leaves(self, sequence: Sequence) -> bool:
        """With the next token, whatever it is."""
        return not sequence.has_room_behind(1, self.context_limit) or _is_to_be_held(sequence)

    def follow(self, ahead: AheadPlan, result: StepResult, drawn_s: float) -> StepPlan:
        """Of what holds. `result`: of the step that it was made behind, at `drawn_s`. The plan is out then, and that
        step to be committed before the next plan is made."""
        outcome = zip(ahead.sequences, ahead.after.slices, result.drawn, result.prompt_logprobs, strict=True)
        staying: list[tuple[Sequence, int]] = []  # and the token that it drew
        for goes_on, (sequence, piece, drawn, scored) in zip(ahead.stays, outcome, strict=True):
            if goes_on:
                self._publish(sequence, piece.start + len(piece.token_ids))  # it might be of equal content to one taken
                staying.append((sequence, drawn[0].token_id))
            else:
                self._early[sequence] = self._take_over(piece, sequence, drawn, scored, drawn_s)
        self._short_of_blocks = False
        slices, size = [], self.config.block_tokens
        for (sequence, token_id), piece in zip(staying, ahead.slices, strict=True):
            table, start = piece.block_table, piece.start
            if start == len(table) * size:
                sequence.block_table += self.pool.allocate(1)
                table = sequence.table()
            sequence.in_flight += 1
            sequence.planned_tokens = start + 1
            draw = piece.draw
            if draw is not None and draw.params.needs_history:
                draw = draw._replace(history=(*sequence.tokens(0, start), token_id))
            slices.append(Slice(piece.sequence_id, (token_id,), start, table, draw, adapter=piece.adapter))
        return self._send_out(slices, (sequence for sequence, _ in staying), ahead.slices)

    def holds(self, ahead: AheadPlan, result: StepResult, now_s: float) -> bool:
        """`result`: of the step that it was made behind."""
        (flight,) = self._flights.values()
        assert flight[0] is ahead.after
        due_s = self.next_deadline_s()
        return (
            self._is_all(ahead.sequences)
            and (all(ahead.stays) or not self._roster.waiting)
            and ahead.missing_blocks <= self.pool.available
            and (due_s is None or due_s > now_s)
            and all(map(self._does_as_known, ahead.sequences, ahead.stays, result.drawn))
        )

    def _does_as_known(self, sequence: Sequence, stays: bool, drawn: tuple[Drawn, ...]) -> bool:
        if not stays:
            return self._leaves(sequence)
        token_id = drawn[0].token_id
        if token_id == NO_TOKEN or drawn[0].completes or sequence.stops_at(token_id, self.config.eos_token_ids):
            return False
        return not _is_to_be_held(sequence)


def _is_to_be_held(sequence: Sequence) -> bool:
    """With the next token."""
    return sequence.draws_here is not None and sequence.drawn_here + 1 >= sequence.draws_here
