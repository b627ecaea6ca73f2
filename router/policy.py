"""Where a request runs, as pure functions of frozen load views. The simulator drives this same code.

    waiting in the router's line ──▶ choose_prefill: a worker with room, the one with the least work outstanding
                                 ──▶ rank_decode: workers that can ever hold it, the emptiest first
                                 ──▶ decode_prefills: does it need a prefill worker at all?
    while it runs                ──▶ choose_move: a decode worker short of blocks gives a sequence to one with plenty

Load is counted in tokens: prompt tokens to compute on a prefill worker, tokens of KV on a decode worker. It is what
this router charged it with or what the worker itself reported, whichever is more: a charge knows nothing of other
routers, a report is late. Equal loads go to the smallest worker id, so that the same views always give the same answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

# A prefill worker is given work for this many full steps and no more: it never runs dry while the next request travels,
# and what still waits in the router can go to whichever worker is free first.
BACKLOG_STEPS = 2
# A sequence moves from a decode worker that is short of blocks to one that is, with it, still less full than this, and
# less full than the first by so much: it will not be the next that is short, and nothing comes back.
MOVE_BELOW_FILL, MOVE_MARGIN = 0.7, 0.2


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillView:
    worker_id: str
    charged_tokens: int  # this router's: dispatched, and their first token not yet drawn
    reported_tokens: int  # to be computed as the worker last said, of all routers, less what ended here since
    max_step_tokens: int
    longest_tokens: int  # the longest sequence that it takes

    @property
    def outstanding_tokens(self) -> int:
        return max(self.charged_tokens, self.reported_tokens)

    @property
    def has_room(self) -> bool:
        """Idle, whatever the size of what comes; or with less than its backlog outstanding."""
        return self.outstanding_tokens == 0 or self.outstanding_tokens < BACKLOG_STEPS * self.max_step_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeView:
    worker_id: str
    charged_tokens: int  # KV of this router's sequences: running and reserved
    reported_tokens: int  # KV in use as the worker last said, of all routers
    capacity_tokens: int  # all its KV memory
    longest_tokens: int  # the longest sequence that it takes

    @property
    def held_tokens(self) -> int:
        return max(self.charged_tokens, self.reported_tokens)

    @property
    def fill(self) -> float:
        return self.held_tokens / max(1, self.capacity_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class MoveView:
    """A decode worker since the last look."""

    decode: DecodeView
    is_short: bool  # it preempted, or somebody waits there for blocks
    sequences: tuple[tuple[int, str], ...]  # (tokens of KV, id) of this router's that draw, unless one moves already


class Move(NamedTuple):
    sequence_id: str
    source: str
    target: str


def choose_move(views: Sequence[MoveView]) -> Move | None:
    """The shortest sequence of the fullest worker that is short, to the emptiest that is not; None: all stay. `views`
    are of workers that can take each other's KV."""
    short = [view for view in views if view.is_short and view.sequences]
    roomy = [view.decode for view in views if not view.is_short]
    if not short or not roomy:
        return None
    source = min(short, key=lambda view: (-view.decode.fill, view.decode.worker_id))
    target = min(roomy, key=lambda view: (view.fill, view.worker_id))
    tokens, sequence_id = min(source.sequences)
    then = (target.held_tokens + tokens) / max(1, target.capacity_tokens)
    if then >= MOVE_BELOW_FILL or then > source.decode.fill - MOVE_MARGIN:
        return None
    return Move(sequence_id, source.decode.worker_id, target.worker_id)


def choose_prefill(views: Sequence[PrefillView], total_tokens: int) -> str | None:
    """The worker to prefill a sequence that may grow to `total_tokens`; None: all are busy, wait."""
    fitting = [view for view in views if view.has_room and view.longest_tokens >= total_tokens]
    best = min(fitting, key=lambda view: (view.outstanding_tokens, view.worker_id), default=None)
    return best.worker_id if best is not None else None


def rank_decode(views: Sequence[DecodeView], total_tokens: int, keeper: str | None = None) -> list[str]:
    """Workers to ask for a reservation, in this order, for a sequence that may grow to `total_tokens`. First the
    `keeper`, which holds some of its KV from a hand-over that failed.

    A full worker is in the list: whether blocks can be had now is the worker's own answer, not ours.
    """
    fitting = [view for view in views if view.longest_tokens >= total_tokens]
    return [
        view.worker_id
        for view in sorted(fitting, key=lambda view: (view.worker_id != keeper, view.fill, view.worker_id))
    ]


def decode_prefills(prefill_workers: int, prompt_tokens: int, decode: DecodeView, up_to_tokens: int) -> bool:
    """Whether the decode worker prefills the sequence itself, in its inflight batch, and nothing is handed over.

    Yes when there is no prefill worker, for then it is this or nothing; and when the prompt is at most `up_to_tokens`
    (0 = never) and that decode worker holds nothing: its chunk then delays nobody's next token.
    """
    if prefill_workers == 0:
        return True
    return prompt_tokens <= up_to_tokens and decode.held_tokens == 0
