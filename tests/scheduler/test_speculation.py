"""Guesses, and what becomes of right and wrong ones. That answers stay the same is for test_batch_properties.py."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.batch import Scheduler, SchedulerConfig, Tokens
from scheduler.prompt_lookup import PromptLookup
from scheduler.sequence import Sequence
from scheduler.speculation import room_for_guesses
from spec.errors import InvalidParameter
from spec.sampling import SamplingParams, Speculation, check_logprobs_fit


def brute_force(token_ids: list[int], ngram: int, num_tokens: int) -> tuple[int, ...]:
    """Every earlier place is tried, the latest first; what was guessed counts as if it stood there."""
    for start in range(len(token_ids) - ngram - 1, -1, -1):
        if token_ids[start : start + ngram] == token_ids[len(token_ids) - ngram :]:
            grown = list(token_ids)
            for offset in range(num_tokens):
                grown.append(grown[start + ngram + offset])
            return tuple(grown[len(token_ids) :])
    return ()


@pytest.mark.parametrize("ngram", [1, 2, 3, 7])
def test_lookup_finds_what_brute_force_finds(ngram: int) -> None:
    generator, found = random.Random(ngram), 0
    for _ in range(300):
        alphabet = generator.choice([1, 2, 3, 12])
        token_ids = [generator.randrange(alphabet) for _ in range(generator.randrange(60))]
        lookup, taken = PromptLookup(ngram), 0
        while taken < len(token_ids):
            count = generator.randrange(1, 9)
            lookup.extend(token_ids[taken : taken + count])
            taken = lookup.num_tokens
            num_tokens = generator.randrange(6)
            guesses = lookup.guess(num_tokens)
            expected = brute_force(token_ids[:taken], ngram, num_tokens) if taken >= ngram else ()
            assert guesses == expected, (token_ids[:taken], num_tokens)
            found += bool(guesses)
    assert found > 50


def sequence(max_tokens: int, speculation: Speculation, prompt: int = 12, **options: Any) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, speculation=speculation, ignore_eos=True, **options)
    return Sequence("s", tuple(3 + i % 4 for i in range(prompt)), [], params)


def config(**options: Any) -> SchedulerConfig:
    given = {"num_blocks": 30, "block_tokens": 4, "max_step_tokens": 40, "max_sequences": 8, "max_context_tokens": 90}
    return SchedulerConfig(**{**given, **options})


def run(fake: SimpleNamespace, settings: SchedulerConfig, *sequences: Sequence) -> tuple[Scheduler, Any, list[Tokens]]:
    scheduler, engine, told = Scheduler(settings), fake.Engine(settings.num_blocks, settings.block_tokens), []
    for each in sequences:
        scheduler.add(each, 0.0)
    while (plan := scheduler.plan(0.0)) is not None:
        assert plan.num_tokens <= settings.max_step_tokens
        events = scheduler.commit(plan, engine.execute(plan), 0.0)
        told += [event for event in events if isinstance(event, Tokens)]
        scheduler.check()
    fake.assert_empty(scheduler)
    return scheduler, engine, told


def test_a_pattern_is_answered_in_few_steps(fake: SimpleNamespace) -> None:
    pattern = (3, 4, 5, 6) * 10
    looked_up = sequence(40, Speculation("prompt_lookup", 7, 3), forced_token_ids=pattern)
    scheduler, _, told = run(fake, config(), looked_up)
    assert [drawn.token_id for event in told for drawn in event.drawn] == list(pattern)
    totals = scheduler.totals()
    assert totals["steps"] < 8
    assert totals["accepted_tokens"] == sum(event.accepted_tokens for event in told) == 40 - totals["steps"]
    assert told[-1].finish == "length"


def test_the_draft_model_is_asked_for_what_it_has_not_seen(fake: SimpleNamespace) -> None:
    """Its memory is checked by the fake at every guess; here, that it is given each known token once at most."""
    scheduler, engine, _ = run(fake, config(draft_model=True), sequence(60, Speculation("draft_model", 4)))
    totals = scheduler.totals()
    assert totals["steps"] < 35
    assert 0 < totals["accepted_tokens"] < totals["proposed_tokens"] == engine.guessed
    assert 13 + totals["steps"] - 2 <= engine.caught_up < 12 + 60


def test_a_long_prompt_is_caught_up_within_the_budget_of_steps(fake: SimpleNamespace) -> None:
    settings = config(draft_model=True, max_step_tokens=9, max_sequences=2)
    scheduler, engine, told = run(fake, settings, sequence(30, Speculation("draft_model", 4), prompt=50))
    assert [event.proposed_tokens for event in told[:6]] == [0, 0, 0, 0, 0, 0]
    assert scheduler.totals()["accepted_tokens"] > 0
    assert engine.caught_up <= 80


def test_without_a_draft_model_nothing_is_guessed(fake: SimpleNamespace) -> None:
    scheduler, _, _ = run(fake, config(), sequence(20, Speculation("draft_model", 4)))
    assert scheduler.totals()["proposed_tokens"] == 0


def test_guesses_take_neither_blocks_nor_budget_from_others(fake: SimpleNamespace) -> None:
    """Memory for exactly what is known: guesses stay away, and nobody is preempted for them."""
    tight = config(num_blocks=9, max_step_tokens=8)
    pattern = (3, 4, 5, 6) * 6
    greedy_for_blocks = sequence(24, Speculation("prompt_lookup", 9, 2), forced_token_ids=pattern)
    scheduler, _, told = run(fake, tight, greedy_for_blocks)
    assert [drawn.token_id for event in told for drawn in event.drawn] == list(pattern)
    assert scheduler.totals()["preemptions"] == 0
    assert scheduler.totals()["proposed_tokens"] == 0, "a step has no token to spare"


@pytest.mark.parametrize(
    ("max_tokens", "known", "drawn_here", "draws_here", "expected"),
    [
        (100, 20, 0, None, 5),
        (4, 20, 0, None, 1),
        (2, 20, 0, None, 0),
        (100, 87, 0, None, 2),
        (100, 89, 0, None, 0),
        (100, 20, 0, 1, 0),
        (100, 20, 0, 3, 2),
        (100, 20, 2, 3, 0),
    ],
)
def test_room_for_guesses(max_tokens: int, known: int, drawn_here: int, draws_here: int | None, expected: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, speculation=Speculation("prompt_lookup", 5))
    each = Sequence("s", (1,) * (known - 2), [1, 1], params, draws_here=draws_here)
    each.drawn_here = drawn_here
    assert room_for_guesses(each, 90) == expected


def test_wrong_guesses_become_fewer_and_right_ones_more(fake: SimpleNamespace) -> None:
    """An answer that takes up the pattern of its prompt, then has a new token behind every 3, and takes it up again."""
    pattern, new = (3, 4, 5, 6) * 4, tuple(token_id for new in range(20, 30) for token_id in (3, new))
    given = {"forced_token_ids": (*pattern, *new, *pattern)}
    _, _, told = run(fake, config(), sequence(60, Speculation("prompt_lookup", 8, 1), **given))
    for before, after in itertools.pairwise(event for event in told if event.proposed_tokens):
        most = before.accepted_tokens + (2 if before.accepted_tokens == before.proposed_tokens else 1)
        assert after.proposed_tokens <= min(most, 8)
    assert {1, 8} <= {event.proposed_tokens for event in told}


@pytest.mark.parametrize(
    ("speculation", "field"),
    [
        (Speculation("prompt_lookup", 0), "num_draft_tokens"),
        (Speculation("draft_model", 33), "num_draft_tokens"),
        (Speculation("prompt_lookup", 4, 0), "ngram"),
        (Speculation("prompt_lookup", 4, 17), "ngram"),
    ],
)
def test_what_is_out_of_range_is_named(speculation: Speculation, field: str) -> None:
    with pytest.raises(InvalidParameter) as raised:
        SamplingParams(speculation=speculation).validate(100)
    assert raised.value.details["field"] == field


def test_log_probabilities_of_a_step_must_fit_into_a_message() -> None:
    params = SamplingParams(logprobs=150_000)
    check_logprobs_fit(params, 10)
    with pytest.raises(InvalidParameter):
        check_logprobs_fit(SamplingParams(logprobs=150_000, speculation=Speculation("draft_model", 20)), 10)
