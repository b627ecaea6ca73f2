"""Constraints on answers: which tokens may come next, found while the step that asks is being computed.

    start    before the step runs: jobs of a few threads bring each sequence's matcher to its tokens and ask for a mask
    join     before its rows are drawn: the masks; of one that is late or admits no token, why
    settle   behind the draw: matchers take the new tokens; one behind which none can follow ends the answer

A matcher's state is a function of the constraint and the answer's tokens. So nothing of it travels: constraint and
tokens do, in the sequence state, and whoever goes on (the decode worker behind a hand-over, a worker behind a failover,
the same one behind a preemption) replays them. Guessed tokens are replayed and rolled back in the same way.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from engine.sampling import Mask
from scheduler.plan import NO_TOKEN, Draw, Drawn, Slice
from spec.constraint import Constraint
from spec.errors import InvalidParameter

THREADS = 4
MASK_WAIT_S = 5.0  # far above what the limits of service/grammar.py let a mask take
MAX_COMPILED = 128
BROKEN = "is not kept to by the tokens that the answer begins with"
DEAD_END = "admits no token here"
TOO_SLOW = f"took more than {MASK_WAIT_S:g} s to find the tokens that may come next"


def refuse(constraint: Constraint) -> Matcher:
    """The `compile` of an engine that has no vocabulary's texts."""
    raise constraint.refusal("is not served here")


class Matcher(Protocol):
    """Of one constraint, behind some tokens. llguidance's LLMatcher is one. One thread at a time."""

    def deep_copy(self) -> Matcher: ...
    def try_consume_tokens(self, tokens: list[int], /) -> int:
        """How many of them were taken; at the first that does not fit it stops, and stays usable."""
        ...

    def rollback(self, num_tokens: int, /) -> bool: ...
    def compute_bitmask(self) -> bytes:
        """A bit for each token, the lowest first; those of the vocabulary at least."""
        ...

    def is_stopped(self) -> bool:
        """No token can follow but the end of the sequence."""
        ...

    def is_error(self) -> bool:
        """It ran into a limit, and is of no use any more."""
        ...

    def get_error(self) -> str: ...


@dataclasses.dataclass(slots=True)
class _State:
    """A sequence's matcher, and the tokens of its answer that it has taken. In the hands of one thread at a time."""

    matcher: Matcher
    tokens: list[int] = dataclasses.field(default_factory=list)

    def take(self, tokens: list[int]) -> bool:
        """Goes from the tokens it has taken to these. False: it has taken as many as keep the constraint."""
        known = len(self.tokens)
        if self.tokens != tokens[:known]:
            pairs = zip(self.tokens, tokens, strict=False)
            known = next((at for at, (mine, given) in enumerate(pairs) if mine != given), min(known, len(tokens)))
            self.matcher.rollback(len(self.tokens) - known)
            del self.tokens[known:]
        taken = self.matcher.try_consume_tokens(tokens[known:]) if len(tokens) > known else 0
        self.tokens += tokens[known : known + taken]
        return len(self.tokens) == len(tokens)

    def mask(self, vocab: range) -> Mask | str:
        """The tokens of `vocab` that may come next, or why none may."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            return self.refusal()
        if not bits.any():
            return DEAD_END
        return np.unpackbits(bits, bitorder="little")[vocab.start : vocab.stop].view(np.bool_)

    def refusal(self) -> str:
        """Why it does not take a token."""
        return f"cannot be kept to: {self.matcher.get_error()[:200]}" if self.matcher.is_error() else BROKEN


Found = tuple["_State | None", "list[Mask | str | None]"]  # the state to keep, and a mask for each of the first rows


@dataclasses.dataclass(slots=True)
class Masks:
    """Of the rows of a step that draw. None: any token may come. Where a refusal says why, a mask admits none."""

    allowed: list[Mask | None]
    refusals: dict[int, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Pending:
    """The masks of a step that are being found: (sequence, its rows, the job) each."""

    num_rows: int
    jobs: list[tuple[str, range, concurrent.futures.Future[Found]]] = dataclasses.field(default_factory=list)


class Grammars:
    """`compile` makes a constraint's matcher, or raises InvalidParameter; it is called in threads of this object.

    `vocab` are the tokens whose logits this rank draws from. States of up to `max_sequences` sequences are kept, those
    that were asked for last; who is not among them any more is replayed, at the cost of some microseconds a token.
    start(), join() and settle() are for the one thread that executes steps."""

    def __init__(self, compile: Callable[[Constraint], Matcher], vocab: range, max_sequences: int) -> None:
        self._compile, self._vocab, self._max_sequences = compile, vocab, max_sequences
        self._compiling = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="grammar-compile")
        self._masking = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="grammar-mask")
        self._lock = threading.Lock()  # of the next line
        self._compiled: OrderedDict[Constraint, concurrent.futures.Future[Matcher]] = OrderedDict()
        self._states: OrderedDict[str, _State] = OrderedDict()

    def compiled(self, constraint: Constraint) -> concurrent.futures.Future[Matcher]:
        """Compiled once, however many ask; from any thread. The future's error is an InvalidParameter."""
        with self._lock:
            found = self._compiled.pop(constraint, None) or self._compiling.submit(self._compile, constraint)
            self._compiled[constraint] = found
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return found

    def start(self, slices: Sequence[Slice], draws: Sequence[list[Draw]]) -> Pending:
        """`draws`: each slice's (draws_of); its rows follow one another."""
        pending = Pending(0)
        for piece, each in zip(slices, draws, strict=False):
            if each and each[0].params.constraint is not None:
                job = self._masking.submit(self._find, each, self._states.pop(piece.sequence_id, None))
                rows = range(pending.num_rows, pending.num_rows + len(each))
                pending.jobs.append((piece.sequence_id, rows, job))
            pending.num_rows += len(each)
        return pending

    def _find(self, draws: list[Draw], state: _State | None) -> Found:
        """Of one sequence. A guess that the constraint refuses is not what is drawn: no row behind it counts."""
        constraint = draws[0].params.constraint
        assert constraint is not None
        if state is None:
            state = _State(self.compiled(constraint).result().deep_copy())
        found: list[Mask | str | None] = []
        for each in draws:
            output = list(each.history[each.prompt_tokens :])
            if not state.take(output):
                return (state, found) if found else (None, [state.refusal()])
            is_forced = len(output) < len(each.params.forced_token_ids)
            found.append(None if is_forced else state.mask(self._vocab))
        return state, found

    def join(self, pending: Pending) -> Masks:
        """Waits MASK_WAIT_S at most."""
        masks = Masks([None] * pending.num_rows)
        until_s = time.monotonic() + MASK_WAIT_S
        for sequence_id, rows, job in pending.jobs:
            try:
                state, found = job.result(max(0.0, until_s - time.monotonic()))
            except TimeoutError:
                state, found = None, [TOO_SLOW]
            except InvalidParameter as error:
                state, found = None, [error.message.removeprefix(f"{error.details['field']} ")]
            if state is not None:
                self._states[sequence_id] = state
            for row, mask in zip(rows, found, strict=False):
                if isinstance(mask, str):
                    masks.refusals[row], mask = mask, np.zeros(len(self._vocab), np.bool_)
                masks.allowed[row] = mask
        return masks

    def settle(
        self,
        slices: Sequence[Slice],
        draws: Sequence[list[Draw]],
        drawn: Sequence[tuple[Drawn, ...]],
        masks: Masks,
    ) -> tuple[tuple[Drawn, ...], ...]:
        """`drawn` of the slices, with what the constraints say of it."""
        settled, row = [], 0
        for piece, each, found in zip(slices, draws, drawn, strict=True):
            if each and each[0].params.constraint is not None:
                found = self._settle(piece.sequence_id, each[0], found, masks.refusals.get(row, ""))
            row += len(each)
            settled.append(found)
        while len(self._states) > self._max_sequences:
            self._states.popitem(last=False)
        return tuple(settled)

    def _settle(self, sequence_id: str, first: Draw, found: tuple[Drawn, ...], refusal: str) -> tuple[Drawn, ...]:
        if found[0].token_id == NO_TOKEN:
            self._states.pop(sequence_id, None)
            return (found[0]._replace(refusal=refusal),)
        state, tokens = self._states.get(sequence_id), list(first.history[first.prompt_tokens :])
        for place, each in enumerate(found):
            tokens.append(each.token_id)
            if state is None or not state.take(tokens):  # a token that was forced upon it; the next step says so
                break
            if state.matcher.is_stopped() and not state.matcher.is_error():
                del self._states[sequence_id]
                return (*found[:place], each._replace(completes=True))
        return found

    def close(self) -> None:
        """Waits for what runs."""
        for pool in (self._compiling, self._masking):
            pool.shutdown(wait=True, cancel_futures=True)
