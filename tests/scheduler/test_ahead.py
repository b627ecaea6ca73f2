"""A plan that was made ahead is the one that is made without: the same plans, events, counts and blocks, step by step.

One scheduler plans behind every commit, as always: the oracle. The other plans ahead, follows where that holds, and
commits afterwards. Both are told the same things at the same moments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.batch import Event, Failed, Scheduler, SchedulerConfig, Tokens
from scheduler.plan import NO_TOKEN, Drawn, Slice, StepPlan, StepResult
from scheduler.sequence import Sequence
from spec.constraint import Constraint
from spec.sampling import SamplingParams, Speculation

EOS = (3,)


def any_params(rng: random.Random) -> SamplingParams:
    """Mostly what can be planned ahead."""
    return SamplingParams(
        max_tokens=rng.choice([1, 5, 20, 30]),
        seed=rng.randrange(5),
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=(11,) if rng.random() < 0.2 else (),
        presence_penalty=0.5 if rng.random() < 0.2 else 0.0,
        constraint=Constraint("regex", ("a*",)) if rng.random() < 0.2 else None,
        prompt_logprobs=0 if rng.random() < 0.1 else None,
        speculation=Speculation("prompt_lookup", 2, 1) if rng.random() < 0.05 else None,
    )


def completed(piece: Slice, drawn: tuple[Drawn, ...]) -> tuple[Drawn, ...]:
    """What a constraint makes of what was drawn, by the whole answer: the history is that of the newest token."""
    if piece.draw is None or piece.draw.params.constraint is None:
        return drawn
    assert len(piece.draw.history) == piece.draw.position
    assert piece.draw.history[-1] == piece.token_ids[-1]
    return tuple(each._replace(completes=(sum(piece.draw.history) + each.token_id) % 8 == 0) for each in drawn)


class Side:
    """One scheduler and its engine."""

    def __init__(self, fake: SimpleNamespace, config: SchedulerConfig) -> None:
        self.fake, self.scheduler = fake, Scheduler(config)
        self.engine = fake.Engine(config.num_blocks, config.block_tokens)
        self.used: list[list[bytes]] = []
        self.scheduler.prefix.on_use = lambda contents: self.used.append(list(contents))
        self.events: list[Event] = []
        self.reserved: list[list[int]] = []

    def adopt(self, sequence: Sequence, computed_tokens: int, now_s: float) -> None:
        pool = self.scheduler.pool
        if (needed := pool.blocks_for(computed_tokens)) > self.scheduler.spare_blocks():
            return
        table = pool.allocate(needed)
        self.engine.write(table, 0, self.fake.kv_of(sequence.prompt_token_ids[:computed_tokens]))
        self.scheduler.adopt(sequence, table, computed_tokens, now_s)

    def reserve(self, num_blocks: int) -> None:
        if num_blocks <= self.scheduler.spare_blocks():
            self.reserved.append(self.scheduler.pool.allocate(num_blocks))

    def give_back(self) -> None:
        if self.reserved:
            self.scheduler.pool.release(self.reserved.pop())

    def execute(self, plan: StepPlan, broken: str | None) -> StepResult:
        """`broken`: whose logits are not finite. A constraint is met by one token in eight."""
        result = self.engine.execute(plan)
        pairs = zip(plan.slices, result.drawn, strict=True)
        drawn = tuple((Drawn(NO_TOKEN),) if d and p.sequence_id == broken else completed(p, d) for p, d in pairs)
        return StepResult(drawn, result.prompt_logprobs)

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> None:
        self.events += self.scheduler.commit(plan, result, now_s)

    def plan(self, now_s: float) -> StepPlan | None:
        self.events += self.scheduler.expire(now_s)
        return self.scheduler.plan(now_s)


class Pair:
    """`num_sequences` come at random, and others meddle."""

    def __init__(self, fake: SimpleNamespace, config: SchedulerConfig, seed: int, num_sequences: int) -> None:
        self.fake, self.rng, self.left = fake, random.Random(seed), num_sequences
        self.sides = self.plain, self.ahead = Side(fake, config), Side(fake, config)
        self.followed = self.made = self.without_leavers = 0
        self.now_s = 0.0
        self.out: list[Any] = []  # the plan that is out, of each side
        self.names: list[str] = []
        self.stems = [tuple(self.rng.randrange(50) for _ in range(30)) for _ in range(2)]

    def both(self, call: str, *arguments: Any) -> None:
        found = [getattr(side.scheduler, call)(*arguments) for side in self.sides]
        assert found[0] == found[1]

    def some(self) -> str:
        return self.rng.choice(self.names) if self.names else "nobody"

    def come(self) -> None:
        """One more, as a request or as a hand-over."""
        self.left -= 1
        rng, name = self.rng, f"s{self.left}"
        self.names.append(name)
        limit = self.plain.scheduler.context_limit
        length = rng.randint(1, max(1, min(30, limit - 2)))
        prompt = (*rng.choice(self.stems)[: rng.choice([0, length])], *(rng.randrange(50) for _ in range(length)))[
            :length
        ]
        params, deadline_s = any_params(rng), self.now_s + rng.choice([5.0, 40.0, 1e9, 1e9])
        draws_here = rng.choice([None, None, None, None, 3])
        adopted = length > 1 and rng.random() < 0.3
        for side in self.sides:
            sequence = Sequence(name, prompt, [], params, deadline_s, draws_here)
            if adopted:
                side.adopt(sequence, length - 1, self.now_s)
            else:
                side.scheduler.add(sequence, self.now_s)

    def meddle(self, *, with_aborts: bool) -> None:
        """What others do, with the lock held, while a step is computed or right before it is."""
        rng = self.rng
        while self.left and rng.random() < 0.15:
            self.come()
        if with_aborts and rng.random() < 0.05:
            self.both("abort", self.some(), self.now_s)
        if rng.random() < 0.04:
            self.both("take_out", self.some())
        if rng.random() < 0.1:
            self.both("put_back", self.some())
        if rng.random() < 0.1:
            self.both("release", self.some())
        reserved = rng.randint(1, 4) if rng.random() < 0.1 else 0
        gives_back = rng.random() < 0.2
        for side in self.sides:
            if reserved:
                side.reserve(reserved)
            if gives_back:
                side.give_back()

    def step(self, now_s: float) -> None:
        """`out` is carried out by both, and becomes what comes behind it."""
        plain, ahead = self.sides
        broken = self.some() if self.rng.random() < 0.02 else None
        made = ahead.scheduler.plan_ahead()
        self.meddle(with_aborts=True)
        results = [side.execute(plan, broken) for side, plan in zip(self.sides, self.out, strict=True)]
        assert results[0] == results[1]
        plain.commit(self.out[0], results[0], now_s)
        following = plain.plan(now_s)
        holds = made is not None and ahead.scheduler.holds(made, results[1], now_s)
        found = ahead.scheduler.follow(made, results[1], now_s) if holds else None
        self.without_leavers += bool(holds) and not all(made.stays)
        self.made, self.followed = self.made + (made is not None), self.followed + (found is not None)
        if found is not None:
            assert found.ahead is made.slices
            self.meddle(with_aborts=False)
            ahead.scheduler.check()
        ahead.commit(self.out[1], results[1], now_s)
        if found is None:
            found = ahead.plan(now_s)
        self.out = [following, found]
        assert found == following

    def run(self) -> None:
        while True:
            self.now_s += 1.0
            self.out = [side.plan(self.now_s) for side in self.sides]
            assert self.out[0] == self.out[1]
            while self.out[0] is not None:
                self.now_s += 1.0
                self.step(self.now_s)
                self.compare()
            load = self.plain.scheduler.load()
            if not self.left and load.waiting + load.running == 0 and not any(side.reserved for side in self.sides):
                break
            self.meddle(with_aborts=True)
        for name in self.names:
            self.both("release", name)
        for side in self.sides:
            self.fake.assert_empty(side.scheduler)

    def compare(self) -> None:
        plain, ahead = self.sides
        assert plain.events == ahead.events or _told(plain.events) == _told(ahead.events)
        assert plain.used == ahead.used
        assert plain.reserved == ahead.reserved
        for of in ("load", "totals", "counts", "spare_blocks", "next_deadline_s"):
            assert getattr(plain.scheduler, of)() == getattr(ahead.scheduler, of)()
        pools = [side.scheduler.pool for side in self.sides]
        assert pools[0].num_cached == pools[1].num_cached
        for side in self.sides:
            side.scheduler.check()


def _told(events: Many[Event]) -> list[object]:
    """Errors are compared by what they say."""
    return [(e.sequence_id, e.error.reason, e.error.message) if isinstance(e, Failed) else e for e in events]


def config_of(**changes: Any) -> SchedulerConfig:
    values = {"num_blocks": 40, "block_tokens": 4, "max_step_tokens": 32, "max_sequences": 4}
    return SchedulerConfig(**(values | {"max_context_tokens": 64, "eos_token_ids": EOS} | changes))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    seed=st.integers(0, 2**32),
    block_tokens=st.sampled_from([1, 2, 3, 5, 16]),
    num_blocks=st.integers(6, 60),
    max_sequences=st.sampled_from([1, 2, 3, 8]),
    extra_step_tokens=st.sampled_from([0, 1, 6, 1000]),
    caching=st.booleans(),
)
def test_the_plans_events_and_counts_are_those_without(
    fake: SimpleNamespace,
    seed: int,
    block_tokens: int,
    num_blocks: int,
    max_sequences: int,
    extra_step_tokens: int,
    caching: bool,
) -> None:
    config = config_of(
        block_tokens=block_tokens,
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        max_step_tokens=max_sequences + extra_step_tokens,
        prefix_caching=caching,
    )
    Pair(fake, config, seed, num_sequences=8).run()


def test_what_it_is_about_does_happen(fake: SimpleNamespace) -> None:
    """The property would prove little if plans were never followed, or always."""
    seen: dict[str, int] = {}
    for seed in range(30):
        pair = Pair(fake, config_of(num_blocks=24), seed, num_sequences=8)
        pair.run()
        found = {"followed": pair.followed, "dropped": pair.made - pair.followed, **pair.ahead.scheduler.totals()}
        found["without leavers"] = pair.without_leavers
        for name, count in found.items():
            seen[name] = seen.get(name, 0) + count
    assert seen["followed"] > 0.4 * seen["steps"]
    assert seen["dropped"] > 0.05 * seen["steps"]
    for name in (
        "preemptions",
        "adopted",
        "cached_tokens",
        "failed",
        "aborted",
        "expired",
        "evictions",
        "without leavers",
    ):
        assert seen[name] > 0, name


def run_quietly(pair: Pair, *sequences: tuple[str, SamplingParams]) -> None:
    """Of equal prompts, one after the other."""
    pair.meddle = lambda *, with_aborts: None  # type: ignore[method-assign]
    for name, params in sequences:
        for side in pair.sides:
            side.scheduler.add(Sequence(name, (7, 8, 9, 10, 11), [], params), pair.now_s)
        pair.run()


def test_a_full_block_is_published_before_one_of_equal_content_is_evicted(fake: SimpleNamespace) -> None:
    """The second answer repeats the first: its third block is full when the next one has to be taken from the cache,
    where the first answer's third is the next to go."""
    pair = Pair(fake, config_of(num_blocks=5), 0, 0)
    first, second = (SamplingParams(max_tokens=count, ignore_eos=True) for count in (8, 14))
    run_quietly(pair, ("first", first), ("second", second))
    assert pair.followed == 7 + 13  # all but the first of each
    assert pair.ahead.scheduler.totals()["evictions"] > 0


@pytest.mark.parametrize("sequence_id", ["a", "b"])
def test_one_is_given_up_between_following_and_committing(fake: SimpleNamespace, sequence_id: str) -> None:
    """Nothing is told of it any more; its blocks stay until the step that writes them is committed."""
    side, params = Side(fake, config_of()), SamplingParams(max_tokens=20, ignore_eos=True)
    scheduler = side.scheduler
    for name in ("a", "b"):
        scheduler.add(Sequence(name, (1, 2, 3), [], params), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    made, result = scheduler.plan_ahead(), side.execute(plan, None)
    assert made is not None
    assert scheduler.holds(made, result, 1.0)
    following = scheduler.follow(made, result, 1.0)
    assert scheduler.abort(sequence_id, 1.0)
    side.commit(plan, result, 1.0)
    assert {event.sequence_id for event in side.events} == {"a", "b"} - {sequence_id}
    assert scheduler.pool.num_held == 2
    side.commit(following, side.execute(following, None), 2.0)
    assert scheduler.pool.num_held == 1
    while (plan := side.plan(3.0)) is not None:
        side.commit(plan, side.execute(plan, None), 3.0)
    (other,) = {"a", "b"} - {sequence_id}
    tokens = [drawn.token_id for event in side.events if isinstance(event, Tokens) for drawn in event.drawn]
    assert tokens == fake.answer((1, 2, 3), (), params, EOS, 64)[0], other
    fake.assert_empty(scheduler)


def test_with_several_plans_out_nothing_is_made_ahead(fake: SimpleNamespace) -> None:
    scheduler = Scheduler(config_of(steps_out=2))
    scheduler.add(Sequence("a", (1, 2, 3), [], SamplingParams(max_tokens=20)), 0.0)
    assert scheduler.plan(0.0) is not None
    assert scheduler.plan_ahead() is None
