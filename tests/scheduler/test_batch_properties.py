"""Whatever the blocks, chunks, mix, prefix hits, preemptions, aborts, pipeline depth: the same tokens, and no leak."""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scheduler.batch import Computed, Failed, Preempted, Scheduler, SchedulerConfig, Tokens
from scheduler.sequence import Sequence
from spec.sampling import SamplingParams, Speculation

EOS = (3,)


@dataclasses.dataclass
class Job:
    sequence: Sequence
    arrives: int
    aborts: int | None
    start_output: list[int]
    indices: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish: str | None = None
    held: bool = False
    aborted: bool = False
    computed: int = 0
    scores: tuple[Any, ...] = ()


def make_jobs(rng: random.Random, config: SchedulerConfig, count: int) -> list[Job]:
    stems = [tuple(rng.randrange(50) for _ in range(40)) for _ in range(2)]
    limit = min(config.max_context_tokens, config.num_blocks * config.block_tokens)
    jobs = []
    for number in range(count):
        length = rng.randint(1, max(1, min(30, limit - 4)))
        shared = rng.choice([0, length // 2, length])
        prompt = (*rng.choice(stems)[:shared], *(rng.randrange(50) for _ in range(length - shared)))
        params = SamplingParams(
            max_tokens=rng.randint(1, 12),
            seed=rng.randrange(5),
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=(11,) if rng.random() < 0.3 else (),
            presence_penalty=rng.choice([0.0, 0.0, 0.5]),
            prompt_logprobs=rng.choice([None, None, 0]),
            forced_token_ids=(9, 8)[: rng.choice([0, 0, 1])],
            speculation=any_speculation(rng),
        )
        if params.max_tokens > 6 and rng.random() < 0.3:  # something to look up
            params = dataclasses.replace(params, forced_token_ids=((9, 8, 7) * 4)[: params.max_tokens])
        resumed = [rng.randrange(50) for _ in range(rng.choice([0, 0, 2]))]
        if len(resumed) >= params.max_tokens or length + len(resumed) + 1 > limit:
            resumed = []
        draws_here = rng.choice([None, None, None, 1, 2])
        sequence = Sequence(f"s{number}", prompt, list(resumed), params, draws_here=draws_here)
        aborts = rng.randint(0, 15) if rng.random() < 0.2 else None
        jobs.append(Job(sequence, rng.randint(0, 6), aborts, resumed))
    return jobs


def any_speculation(rng: random.Random) -> Speculation | None:
    kind = rng.choice([None, "prompt_lookup", "draft_model"])
    return None if kind is None else Speculation(kind, rng.choice([1, 2, 5]), rng.choice([1, 2]))  # type: ignore[arg-type]


def note(job: Job, event: object, config: SchedulerConfig) -> None:
    match event:
        case Computed():
            assert event.first_token == job.computed or job.computed == 0  # from where it was, or from a prefix hit
            job.computed = event.first_token + event.num_tokens
            assert len(event.block_table) == -(-job.computed // config.block_tokens)
        case Tokens():
            assert not job.aborted
            assert job.finish is None
            assert event.first_index == len(job.start_output) + len(job.tokens)
            job.tokens += [drawn.token_id for drawn in event.drawn]
            assert not (job.scores and event.prompt_logprobs)
            job.scores = job.scores or event.prompt_logprobs
            job.finish, job.held = event.finish, event.held
            assert event.accepted_tokens <= min(event.proposed_tokens, len(event.drawn))
        case Preempted():
            job.computed = 0
        case Failed():
            raise AssertionError(event.error)


class Run:
    """Drives the scheduler to the end; `depth` plans are out at once. Aborts fall between plan and commit, too."""

    def __init__(
        self, fake: SimpleNamespace, config: SchedulerConfig, jobs: list[Job], rng: random.Random, depth: int
    ) -> None:
        self.config, self.jobs, self.rng, self.depth, self.fake = config, jobs, rng, depth, fake
        self.scheduler = Scheduler(config)
        self.engine = fake.Engine(config.num_blocks, config.block_tokens)
        self.by_id = {job.sequence.sequence_id: job for job in jobs}
        self.flights: list[Any] = []
        self.held: list[Job] = []

    def to_the_end(self) -> Scheduler:
        for step in range(3000):
            load = self.scheduler.load()
            if step > 6 and not self.flights and load.waiting + load.running == 0:
                break
            self.step(step)
            if self.held and (self.rng.random() < 0.3 or self.scheduler.load().running == 0):
                self.scheduler.release(self.held.pop(0).sequence.sequence_id)
        else:
            raise AssertionError("the sequences do not come to an end")
        for job in self.held:
            self.scheduler.release(job.sequence.sequence_id)
        self.fake.assert_empty(self.scheduler)
        return self.scheduler

    def step(self, step: int) -> None:
        for job in self.jobs:
            if job.arrives == step:
                self.scheduler.add(job.sequence, float(step))
        if (plan := self.scheduler.plan(float(step))) is not None:
            assert plan.num_tokens <= self.config.max_step_tokens
            assert len(plan.slices) <= self.config.max_sequences
            self.flights.append((plan, self.engine.execute(plan)))
        for job in self.jobs:
            if job.aborts == step and job.arrives <= step:
                job.aborted = self.scheduler.abort(job.sequence.sequence_id, float(step))
        self.scheduler.check()
        if self.flights and (len(self.flights) >= self.depth or plan is None):
            self.commit(float(step))
            self.scheduler.check()

    def commit(self, now_s: float) -> None:
        for event in self.scheduler.commit(*self.flights.pop(0), now_s):
            job = self.by_id[event.sequence_id]
            note(job, event, self.config)
            if job.held and isinstance(event, Tokens):
                self.held.append(job)


def judge(fake: SimpleNamespace, job: Job, config: SchedulerConfig, limit: int) -> None:
    prompt = job.sequence.prompt_token_ids
    expected, finish = fake.answer(prompt, job.start_output, job.sequence.params, config.eos_token_ids, limit)
    drawn = expected[len(job.start_output) :]
    if job.aborted:
        assert job.tokens == drawn[: len(job.tokens)]
        return
    if job.sequence.draws_here is not None and len(drawn) > job.sequence.draws_here:
        assert job.held
        drawn, finish = drawn[: job.sequence.draws_here], None
    assert job.tokens == drawn
    assert job.finish == finish
    if job.sequence.params.prompt_logprobs is not None and not job.start_output:
        assert job.scores == fake.prompt_scores(prompt)
    else:
        assert job.scores == ()


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(
    seed=st.integers(0, 2**32),
    block_tokens=st.sampled_from([1, 2, 3, 5, 16]),
    num_blocks=st.integers(6, 60),
    max_sequences=st.sampled_from([1, 2, 3, 8]),
    extra_step_tokens=st.sampled_from([0, 1, 6, 63, 1000]),
    caching=st.booleans(),
    depth=st.sampled_from([1, 1, 2, 3]),
    draft_model=st.booleans(),
    sharing=st.booleans(),
)
def test_tokens_are_those_of_one_sequence_alone(
    fake: SimpleNamespace,
    seed: int,
    block_tokens: int,
    num_blocks: int,
    max_sequences: int,
    extra_step_tokens: int,
    caching: bool,
    depth: int,
    draft_model: bool,
    sharing: bool,
) -> None:
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=block_tokens,
        max_step_tokens=max_sequences + extra_step_tokens,
        max_sequences=max_sequences,
        max_context_tokens=64,
        eos_token_ids=EOS,
        prefix_caching=caching,
        draft_model=draft_model,
        steps_out=depth if sharing else 1,
    )
    rng = random.Random(seed)
    jobs = make_jobs(rng, config, count=rng.randint(1, 9))
    scheduler = Run(fake, config, jobs, rng, depth).to_the_end()
    for job in jobs:
        judge(fake, job, config, scheduler.context_limit)
    if not caching:
        assert scheduler.totals()["cached_tokens"] == 0


@pytest.mark.parametrize("max_step_tokens", [1, 7, 64, 1000])
def test_the_mix_really_preempts_hits_and_evicts(fake: SimpleNamespace, max_step_tokens: int) -> None:
    """The property above would prove little if its cases never met what it is about."""
    seen: dict[str, int] = {}
    for seed in range(30):
        config = SchedulerConfig(
            num_blocks=14,
            block_tokens=4,
            max_step_tokens=max_step_tokens,
            max_sequences=min(6, max_step_tokens),
            max_context_tokens=64,
            eos_token_ids=EOS,
            draft_model=True,
        )
        rng = random.Random(seed)
        jobs = make_jobs(rng, config, count=8)
        scheduler = Run(fake, config, jobs, rng, depth=1).to_the_end()
        for job in jobs:
            judge(fake, job, config, scheduler.context_limit)
        for name, count in scheduler.totals().items():
            seen[name] = seen.get(name, 0) + count
    assert seen["cached_tokens"] > 0
    assert seen["evictions"] > 0
    assert seen["aborted"] > 0
    assert seen["accepted_tokens"] < seen["proposed_tokens"] or max_step_tokens == 1  # has no room for guesses
    assert seen["accepted_tokens"] > 0 or max_step_tokens == 1
    assert seen["preemptions"] > 0 or max_step_tokens == 1  # one at a time never needs to
