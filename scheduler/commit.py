"""What came of a step: KV that was computed becomes prefix content, tokens that were drawn become known, what is
finished ends.

Which steps there are is decided in scheduler/batch.py.
"""

from __future__ import annotations

from collections.abc import Iterable

from scheduler.config import SchedulerConfig
from scheduler.events import Computed, Event, Failed, Finish, Tokens
from scheduler.lifetime import Stage
from scheduler.membership import Membership
from scheduler.plan import NO_TOKEN, Drawn, Slice, StepPlan, StepResult, TokenLogprobs
from scheduler.sequence import Sequence
from scheduler.speculation import draft_computed_after, guess_limit_after
from spec import errors


class Commits(Membership):
    """The part of a Scheduler that takes results over."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._steps = 0

    def _send_out(
        self, slices: Iterable[Slice], sequences: Iterable[Sequence], ahead: tuple[Slice, ...] | None = None
    ) -> StepPlan:
        """`sequences`: whose slices they are. The plan is out until it is committed."""
        plan = StepPlan(self._steps, tuple(slices), ahead)
        self._flights[plan.step] = (plan, tuple(sequences))
        self._steps += 1
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> list[Event]:
        """Takes the result of a plan over. What came for a sequence that has ended meanwhile is dropped."""
        planned, sequences = self._flights.pop(plan.step)
        assert planned is plan
        events, self._untold = self._untold, []
        outcome = zip(plan.slices, sequences, result.drawn, result.prompt_logprobs, strict=True)
        for piece, sequence, drawn, scored in outcome:
            early = self._early.pop(sequence, None)
            events += self._take_over(piece, sequence, drawn, scored, now_s) if early is None else early
        self._totals["steps"] += 1
        self._totals["computed_tokens"] += plan.num_tokens
        return events

    def _take_over(
        self,
        piece: Slice,
        sequence: Sequence,
        drawn: tuple[Drawn, ...],
        scored: tuple[TokenLogprobs, ...],
        now_s: float,
    ) -> list[Event]:
        sequence.in_flight -= 1
        if sequence.stage is Stage.LEAVING:
            if not sequence.in_flight:
                self._end(sequence)
            return []
        assert bool(drawn) == (piece.draw is not None)
        assert len(scored) == len(piece.prompt_targets)
        if drawn and drawn[0].token_id == NO_TOKEN:  # its KV is suspect, too: nothing of it is published
            self._end(sequence)
            self._totals["failed"] += 1
            return [Failed(sequence.sequence_id, _why_no_token(sequence, drawn[0]))]
        known, kept, finish = sequence.known_tokens, drawn, None
        if drawn:
            kept, finish = sequence.extend(drawn, self.config.eos_token_ids, self.context_limit)
        accepted = min(len(kept), max(len(drawn) - 1, 0))
        if piece.num_guesses:
            sequence.guess_limit = guess_limit_after(piece.num_guesses, accepted)
        if piece.proposal is not None:
            sequence.draft_computed_tokens = draft_computed_after(piece.proposal, known, accepted)
        assert sequence.computed_tokens == piece.start
        sequence.computed_tokens = piece.start + len(piece.token_ids) + max(len(kept) - 1, 0)
        if not sequence.in_flight:
            sequence.planned_tokens = sequence.computed_tokens
        sequence.prompt_logprobs += scored
        self._publish(sequence, sequence.computed_tokens)
        count = sequence.computed_tokens - piece.start
        table = piece.block_table[: self.pool.blocks_for(sequence.computed_tokens)]
        events: list[Event] = [Computed(piece.sequence_id, piece.start, count, table, self.config.group)]
        if kept:
            events.append(self._drawn(sequence, kept, finish, piece.num_guesses, accepted, now_s))
        return events

    def _drawn(
        self,
        sequence: Sequence,
        drawn: tuple[Drawn, ...],
        finish: Finish | None,
        proposed: int,
        accepted: int,
        now_s: float,
    ) -> Tokens:
        sequence.drawn_here += len(drawn)
        self._totals["generated_tokens"] += len(drawn)
        self._totals["proposed_tokens"] += proposed
        self._totals["accepted_tokens"] += accepted
        scored = tuple(sequence.prompt_logprobs)
        sequence.prompt_logprobs.clear()
        held = finish is None and sequence.draws_here is not None and sequence.drawn_here >= sequence.draws_here
        if finish is not None:
            self._end(sequence)
            self._totals["finished"] += 1
        elif held:
            self._roster.move(sequence, Stage.HELD)
        assert sequence.started_s is not None
        return Tokens(
            sequence_id=sequence.sequence_id,
            first_index=len(sequence.output_token_ids) - len(drawn),
            drawn=drawn,
            prompt_logprobs=scored,
            finish=finish,
            held=held,
            cached_tokens=sequence.cached_tokens,
            queued_s=sequence.queued_s,
            started_s=sequence.started_s,
            drawn_s=now_s,
            proposed_tokens=proposed,
            accepted_tokens=accepted,
        )

    def _publish(self, sequence: Sequence, computed_tokens: int) -> None:
        """Blocks that have become full become prefix content."""
        size, first = self.config.block_tokens, sequence.published_blocks
        full = computed_tokens // size
        if full == first or not self.prefix.enabled:
            return
        hashes = sequence.block_hashes
        if len(hashes) < full:
            self.prefix.extend(hashes, sequence.tokens(len(hashes) * size, full * size), sequence.adapter)
        self.prefix.publish(hashes, sequence.block_table, first, full)
        sequence.published_blocks = full


def _why_no_token(sequence: Sequence, drawn: Drawn) -> errors.LegatoError:
    constraint = sequence.params.constraint
    if drawn.refusal and constraint is not None:
        return constraint.refusal(drawn.refusal)
    return errors.InternalError("the model's logits were not finite")
