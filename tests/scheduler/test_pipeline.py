"""Several plans out at once: each takes its share of the sequences, and chunks of one prompt follow each other."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.batch import Scheduler, SchedulerConfig, Tokens
from scheduler.plan import StepPlan
from scheduler.sequence import Sequence
from spec.sampling import SamplingParams

NO_EOS = SamplingParams(max_tokens=9, ignore_eos=True)


class Pipeline:
    """Plans go in while there is room for them, and come out in their order."""

    def __init__(self, fake: SimpleNamespace, steps_out: int, **changes: Any) -> None:
        values = {"num_blocks": 64, "block_tokens": 4, "max_step_tokens": 16, "max_sequences": 16}
        values |= {"max_context_tokens": 200, "steps_out": steps_out} | changes
        self.scheduler = Scheduler(SchedulerConfig(**values))
        self.engine = fake.Engine(values["num_blocks"], values["block_tokens"])
        self.out: list[tuple[StepPlan, Any]] = []
        self.tokens: dict[str, list[int]] = {}
        self.now_s = 0.0

    def add(self, name: str, length: int, params: SamplingParams = NO_EOS) -> Sequence:
        sequence = Sequence(name, tuple((ord(name[0]) + i) % 50 for i in range(length)), [], params)
        self.scheduler.add(sequence, self.now_s)
        return sequence

    def fill(self) -> list[dict[str, int]]:
        """Tokens of each sequence in the plans that go in."""
        found = []
        while len(self.out) < self.scheduler.config.steps_out:
            self.now_s += 1
            if (plan := self.scheduler.plan(self.now_s)) is None:
                break
            self.out.append((plan, self.engine.execute(plan)))
            found.append({piece.sequence_id: len(piece.token_ids) for piece in plan.slices})
            self.scheduler.check()
        return found

    def commit(self) -> None:
        for event in self.scheduler.commit(*self.out.pop(0), self.now_s):
            if isinstance(event, Tokens):
                self.tokens.setdefault(event.sequence_id, []).extend(each.token_id for each in event.drawn)
        self.scheduler.check()


@pytest.mark.parametrize(
    ("num_sequences", "steps_out", "shares"),
    [(8, 2, [4, 4]), (7, 2, [4, 3]), (9, 4, [3, 3, 3]), (1, 4, [1]), (5, 1, [5]), (13, 3, [5, 5, 3])],
)
def test_each_plan_takes_its_share(
    fake: SimpleNamespace, num_sequences: int, steps_out: int, shares: list[int]
) -> None:
    pipeline = Pipeline(fake, steps_out)
    for number in range(num_sequences):
        pipeline.add(f"{chr(97 + number)}", 1)
    assert [len(plan) for plan in pipeline.fill()] == shares
    for _ in range(7):
        pipeline.commit()
        (again,) = pipeline.fill() or [{}]
        assert len(again) in shares


def test_those_who_are_left_are_shared_anew(fake: SimpleNamespace) -> None:
    """One half ends: the other does not stay in one plan, with the pipe half empty."""
    pipeline = Pipeline(fake, 2)
    for number in range(8):
        pipeline.add(chr(97 + number), 1, SamplingParams(max_tokens=2 if number < 4 else 20, ignore_eos=True))
    for _ in range(8):
        pipeline.fill()
        pipeline.commit()
    pipeline.fill()
    assert sorted(len(plan.slices) for plan, _ in pipeline.out) == [2, 2]


def test_who_finds_no_room_has_no_share(fake: SimpleNamespace) -> None:
    pipeline = Pipeline(fake, 2, num_blocks=9, max_context_tokens=30)
    for number in range(12):
        pipeline.add(chr(97 + number), 6, SamplingParams(max_tokens=18, ignore_eos=True))
    for _ in range(6):
        pipeline.fill()
        pipeline.commit()
    pipeline.fill()
    running = pipeline.scheduler.load().running
    assert 2 <= running < 12
    assert max(len(plan.slices) for plan, _ in pipeline.out) == -(-running // 2)


def test_chunks_of_a_prompt_follow_each_other(fake: SimpleNamespace) -> None:
    """Without a wait for results; what is behind the draw waits for it."""
    pipeline = Pipeline(fake, 3)
    pipeline.add("a", 39)
    assert pipeline.fill() == [{"a": 16}, {"a": 16}, {"a": 7}]
    starts = [plan.slices[0].start for plan, _ in pipeline.out]
    assert starts == [0, 16, 32]
    assert [plan.slices[0].draw is not None for plan, _ in pipeline.out] == [False, False, True]
    for _ in range(3):
        assert pipeline.scheduler.plan(9.0) is None
        pipeline.commit()
    assert pipeline.fill() == [{"a": 1}]


@pytest.mark.parametrize("steps_out", [1, 2, 3])
def test_the_tokens_are_those_of_one_plan_at_a_time(fake: SimpleNamespace, steps_out: int) -> None:
    pipeline = Pipeline(fake, steps_out)
    jobs = [pipeline.add(name, length) for name, length in (("a", 45), ("b", 1), ("c", 33), ("d", 20))]
    while pipeline.fill() or pipeline.out:
        pipeline.commit()
    for job in jobs:
        expected, _ = fake.answer(job.prompt_token_ids, (), NO_EOS, (), 200)
        assert pipeline.tokens[job.sequence_id] == expected
    fake.assert_empty(pipeline.scheduler)


@pytest.mark.parametrize("committed", [0, 1, 2])
def test_one_that_is_given_up_between_its_chunks(fake: SimpleNamespace, committed: int) -> None:
    """Its blocks go with the last of them."""
    pipeline = Pipeline(fake, 3)
    pipeline.add("a", 39)
    pipeline.fill()
    for _ in range(committed):
        pipeline.commit()
    assert pipeline.scheduler.abort("a", 9.0)
    assert pipeline.scheduler.pool.num_held > 0
    for _ in itertools.repeat(None, 3 - committed):
        assert pipeline.scheduler.pool.num_held > 0
        pipeline.commit()
    assert pipeline.tokens == {}
    fake.assert_empty(pipeline.scheduler)
