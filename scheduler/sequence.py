"""One sequence as a worker runs it: its tokens, how far their KV is computed, and where it lies.

There is no prefill and no decode in it: `computed_tokens` catches up with the known tokens (prompt and output). Chunks,
prefix hits, KV from afar, preemption and resumption are this one arithmetic.
"""

from __future__ import annotations

import dataclasses
import math

from scheduler.events import Finish
from scheduler.lifetime import Stage, advance
from scheduler.plan import Draw, Drawn, Proposal, Slice, TokenLogprobs
from scheduler.prompt_lookup import PromptLookup
from spec.sampling import MAX_DRAFT_TOKENS, SamplingParams


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """The first seven are the caller's; once it is added, all is the Scheduler's, and only it writes.

    `output_token_ids` may hold tokens at start: they were drawn elsewhere. `draws_here`: None = until finished; k = it
    stops once k tokens are drawn here, its blocks held for the hand-over. `deadline_s` is on the scheduler's clock.
    `adapter` is the id of one that the engine has, its revision included; "": the base model.
    """

    sequence_id: str
    prompt_token_ids: tuple[int, ...]
    output_token_ids: list[int]
    params: SamplingParams
    deadline_s: float = math.inf
    draws_here: int | None = None
    adapter: str = ""

    stage: Stage = Stage.NEW
    arrival: int = -1  # place in the order of arrival; the smaller goes first
    in_flight: int = 0  # steps that are not committed yet and write its blocks
    computed_tokens: int = 0  # KV of positions [0, computed_tokens) is in the blocks
    planned_tokens: int = 0  # once the steps in flight are done, that of positions [0, planned_tokens) is
    cached_tokens: int = 0  # of these, found in the prefix cache when it first ran
    drawn_here: int = 0
    preemptions: int = 0
    queued_s: float = 0.0
    started_s: float | None = None  # its first step was planned
    block_table: list[int] = dataclasses.field(default_factory=list)  # a reference on each
    block_hashes: list[bytes] = dataclasses.field(default_factory=list)  # content chain, as far as it was needed
    published_blocks: int = 0
    prompt_logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)  # the first token takes them along
    lookup: PromptLookup | None = None  # its n-grams, once prompt lookup has been asked for
    guess_limit: int = MAX_DRAFT_TOKENS  # fewer where the last guesses were wrong
    draft_computed_tokens: int = 0  # the draft model's KV of positions [0, ...) is in the same blocks of its own memory
    _table: tuple[int, ...] = ()

    @property
    def known_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def owed_tokens(self) -> int:
        """Known tokens whose KV is not computed."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) - self.computed_tokens

    @property
    def unplanned_tokens(self) -> int:
        """Known tokens that no step computes yet. Behind a step that draws there are none: which token follows is not
        known before it is committed."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) - self.planned_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They go out with the first token of the answer, so one who has a token has had them."""
        return self.params.prompt_logprobs is not None and not self.output_token_ids

    def advance(self, to: Stage) -> None:
        self.stage = advance(self.stage, to)

    def tokens(self, start: int, end: int) -> tuple[int, ...]:
        """Known tokens at positions [start, end)."""
        prompt_tokens = len(self.prompt_token_ids)
        if end <= prompt_tokens:
            return self.prompt_token_ids[start:end]
        output = self.output_token_ids[max(start - prompt_tokens, 0) : end - prompt_tokens]
        return (*self.prompt_token_ids[start:], *output)

    def extend(
        self, drawn: tuple[Drawn, ...], eos_token_ids: tuple[int, ...], context_limit: int
    ) -> tuple[tuple[Drawn, ...], Finish | None]:
        """The drawn tokens up to the one that ends it become known: (these, why it has ended)."""
        for count, each in enumerate(drawn, 1):
            self.output_token_ids.append(each.token_id)
            finish: Finish | None = "stop" if each.completes else self.finish(eos_token_ids, context_limit)
            if finish is not None:
                return drawn[:count], finish
        return drawn, None

    def finish(self, eos_token_ids: tuple[int, ...], context_limit: int) -> Finish | None:
        """Why its newest token is its last; None: it is not."""
        if self.stops_at(self.output_token_ids[-1], eos_token_ids):
            return "stop"
        return None if self.has_room_behind(0, context_limit) else "length"

    def stops_at(self, token_id: int, eos_token_ids: tuple[int, ...]) -> bool:
        params = self.params
        return token_id in params.stop_token_ids or (token_id in eos_token_ids and not params.ignore_eos)

    def has_room_behind(self, num_tokens: int, context_limit: int) -> bool:
        """With so many more tokens another one may follow."""
        output = len(self.output_token_ids) + num_tokens
        return output < self.params.max_tokens and len(self.prompt_token_ids) + output < context_limit

    def table(self) -> tuple[int, ...]:
        """Of all its blocks; the same object until these change."""
        if len(self._table) != len(self.block_table):
            self._table = tuple(self.block_table)
        return self._table

    def forget_blocks(self) -> list[int]:
        """Back to nothing computed; the caller releases the blocks."""
        blocks, self.block_table, self._table = self.block_table, [], ()
        assert not self.in_flight
        self.computed_tokens = self.planned_tokens = self.published_blocks = self.draft_computed_tokens = 0
        self.prompt_logprobs.clear()
        return blocks

    def slice(
        self, num_tokens: int, block_tokens: int, guesses: tuple[int, ...] = (), proposal: Proposal | None = None
    ) -> Slice:
        """Its share of a step: the next `num_tokens` unplanned ones, and a draw if these are all; guesses only then."""
        start, prompt_tokens = self.planned_tokens, len(self.prompt_token_ids)
        end, known = start + num_tokens, prompt_tokens + len(self.output_token_ids)
        table = self.table()
        num_guesses = len(guesses) if proposal is None else proposal.num_tokens
        num_blocks = -(-(end + num_guesses) // block_tokens)
        if num_blocks < len(table):
            table = table[:num_blocks]
        draw = None
        if end == known:
            history = self.tokens(0, known) if self.params.needs_history else ()
            draw = Draw(self.params, known, prompt_tokens, history)
        if num_tokens == 1 and end > prompt_tokens:
            newest = (self.output_token_ids[start - prompt_tokens],)
            return Slice(
                self.sequence_id,
                newest,
                start,
                table,
                draw,
                adapter=self.adapter,
                guessed_token_ids=guesses,
                proposal=proposal,
            )
        assert num_guesses == 0
        targets = self.prompt_token_ids[start + 1 : end + 1] if self.wants_prompt_logprobs else ()
        asked = self.params.prompt_logprobs if targets else None
        return Slice(self.sequence_id, self.tokens(start, end), start, table, draw, asked, targets, self.adapter)
