"""Policy, case by case: who runs, who waits, who gives way, how each sequence ends."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.batch import Computed, Event, Failed, Preempted, Scheduler, SchedulerConfig, Tokens
from scheduler.lifetime import TRANSITIONS, Stage, advance
from scheduler.plan import NO_TOKEN, Drawn
from scheduler.sequence import Sequence
from spec.errors import (
    ContextTooLong,
    DeadlineExceeded,
    InternalError,
    InvalidConfiguration,
    InvalidParameter,
    Overloaded,
)
from spec.sampling import SamplingParams, Speculation


def config(**changes: Any) -> SchedulerConfig:
    values: dict[str, Any] = {
        "num_blocks": 32,
        "block_tokens": 4,
        "max_step_tokens": 16,
        "max_sequences": 8,
        "max_context_tokens": 100,
    }
    return SchedulerConfig(**(values | changes))


def sequence(name: str, length: int, max_tokens: int = 8, **changes: Any) -> Sequence:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    prompt = tuple((len(name) * 31 + ord(name[0]) + i) % 50 for i in range(length))
    return Sequence(name, prompt, changes.pop("output", []), changes.pop("params", params), **changes)


class Worker:
    """Scheduler and engine in step."""

    def __init__(self, fake: SimpleNamespace, **changes: Any) -> None:
        self.scheduler = Scheduler(config(**changes))
        self.engine = fake.Engine(self.scheduler.config.num_blocks, self.scheduler.config.block_tokens)
        self.now_s = 0.0
        self.fake = fake

    def add(self, *sequences: Sequence) -> None:
        for each in sequences:
            self.scheduler.add(each, self.now_s)

    def step(self) -> tuple[dict[str, int], list[Event]]:
        """Tokens that each sequence got in the step, and what came of it."""
        self.now_s += 1.0
        plan = self.scheduler.plan(self.now_s)
        if plan is None:
            return {}, []
        events = self.scheduler.commit(plan, self.engine.execute(plan), self.now_s + 0.5)
        self.scheduler.check()
        return {piece.sequence_id: len(piece.token_ids) for piece in plan.slices}, events

    def finish(self) -> list[Event]:
        told: list[Event] = []
        for _ in range(1000):
            shares, events = self.step()
            told += events
            if not shares:
                break
        self.fake.assert_empty(self.scheduler)
        return told


def test_decodes_come_first_and_chunks_fill_the_rest(fake: SimpleNamespace) -> None:
    worker = Worker(fake)
    worker.add(sequence("a", 3), sequence("b", 2))
    assert worker.step()[0] == {"a": 3, "b": 2}
    worker.add(sequence("long", 40), sequence("later", 5))
    assert worker.step()[0] == {"a": 1, "b": 1, "long": 14}
    assert worker.step()[0] == {"a": 1, "b": 1, "long": 14}
    assert worker.step()[0] == {"a": 1, "b": 1, "long": 12, "later": 2}
    assert worker.step()[0] == {"a": 1, "b": 1, "long": 1, "later": 3}
    worker.finish()


def test_a_decode_is_in_every_step_however_many_prompts_arrive(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=200)
    worker.add(sequence("a", 3, max_tokens=30))
    worker.step()
    for number in range(29):
        worker.add(sequence(f"p{number}", 20, max_tokens=1))
        assert worker.step()[0]["a"] == 1
    worker.finish()


def adopt(worker: Worker, joining: Sequence) -> None:
    """With the KV of its prompt in place; its first token was drawn elsewhere."""
    scheduler = worker.scheduler
    block_table = scheduler.pool.allocate(scheduler.pool.blocks_for(len(joining.prompt_token_ids)))
    worker.engine.write(block_table, 0, worker.fake.kv_of(joining.prompt_token_ids))
    scheduler.adopt(joining, block_table, len(joining.prompt_token_ids), worker.now_s)


def test_a_decode_that_joins_late_goes_before_an_older_chunk(fake: SimpleNamespace) -> None:
    worker = Worker(fake)
    worker.add(sequence("long", 60))
    worker.step()
    adopt(worker, sequence("joins", 6, output=[1]))
    assert list(worker.step()[0].items()) == [("joins", 1), ("long", 15)]
    worker.finish()


def test_a_preempted_one_waits_in_front_of_older_ones_that_never_ran(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=7, max_sequences=2)
    joins = sequence("joins", 8, max_tokens=12, output=[1])
    worker.add(sequence("old", 8, max_tokens=16))
    worker.step()
    worker.add(sequence("big", 18, max_tokens=2))
    adopt(worker, joins)
    while not joins.preemptions:
        worker.step()
    assert worker.scheduler.load().waiting == 2
    assert worker.scheduler.spare_blocks() == 0
    finished = [event.sequence_id for event in worker.finish() if isinstance(event, Tokens) and event.finish]
    assert finished.index("joins") < finished.index("big")


def test_a_reservation_does_not_overtake_one_that_waits_for_room(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=8)
    worker.add(sequence("runs", 8, max_tokens=6))
    worker.step()
    assert worker.scheduler.spare_blocks() == 5, "a quarter block for each who runs is left"
    worker.add(sequence("big", 25, max_tokens=1))
    worker.step()
    assert worker.scheduler.pool.available > 0
    assert worker.scheduler.spare_blocks() == 0
    worker.finish()
    assert worker.scheduler.spare_blocks() == 8


def test_who_waits_does_not_take_what_a_running_one_is_short_of(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=7)
    worker.add(sequence("held", 16, draws_here=1))
    worker.step()
    needs_three = sequence("runs", 16, max_tokens=2)
    worker.scheduler.adopt(needs_three, worker.scheduler.pool.allocate(1), 4, worker.now_s)
    worker.engine.write(needs_three.block_table, 0, fake.kv_of(needs_three.prompt_token_ids)[:4])
    worker.add(sequence("small", 3, max_tokens=2))
    assert worker.scheduler.pool.available == 2
    assert worker.step()[0] == {}
    worker.scheduler.release("held")
    assert list(worker.step()[0].items()) == [("runs", 12), ("small", 3)]
    worker.finish()


def test_who_waits_for_room_costs_nothing_per_step(fake: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its prefix may be thousands of blocks: it is looked up again only when there is more room than last time."""
    worker = Worker(fake, num_blocks=8)
    worker.add(sequence("runs", 8, max_tokens=12), sequence("big", 25, max_tokens=1))
    looked_up: list[int] = []
    find = worker.scheduler.prefix.match
    monkeypatch.setattr(
        worker.scheduler.prefix, "match", lambda known, hashes: looked_up.append(len(known)) or find(known, hashes)
    )
    worker.finish()
    assert looked_up == [8, 25, 25]


def test_prompt_logprobs_survive_a_preemption_halfway(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=9, max_step_tokens=3, max_sequences=2)
    scored = sequence("scored", 24, params=SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True))
    worker.add(sequence("old", 3, max_tokens=20))
    worker.step()
    worker.add(scored)
    told = [event for event in worker.finish() if isinstance(event, Tokens) and event.sequence_id == "scored"]
    assert scored.preemptions == 1
    assert told[0].prompt_logprobs == fake.prompt_scores(scored.prompt_token_ids)


def test_the_oldest_chunk_is_never_starved_by_younger_decodes(fake: SimpleNamespace) -> None:
    """Sequences that are handed over join beyond max_sequences; the oldest keep their places."""
    worker = Worker(fake, max_sequences=2, max_step_tokens=2, num_blocks=64)
    worker.add(sequence("long", 20, max_tokens=1))
    worker.step()
    for number in range(6):
        adopt(worker, sequence(f"d{number}", 4, max_tokens=40, output=[1]))
        assert worker.step()[0]["long"] >= 1
    worker.finish()


def test_first_come_first_served(fake: SimpleNamespace) -> None:
    worker = Worker(fake, max_sequences=1, max_step_tokens=8)
    names = [f"s{number}" for number in range(6)]
    worker.add(*(sequence(name, 9, max_tokens=3) for name in names))
    finished = [event.sequence_id for event in worker.finish() if isinstance(event, Tokens) and event.finish]
    assert finished == names


def test_the_youngest_gives_way_and_goes_on_in_front(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=7, max_step_tokens=100)
    first, second = sequence("old", 8, max_tokens=16), sequence("young", 8, max_tokens=8)
    worker.add(first, second)
    worker.step()
    worker.add(sequence("new", 8, max_tokens=2))
    events: list[Event] = []
    shares: dict[str, int] = {}
    while not second.preemptions:
        shares, told = worker.step()
        events += told
    assert shares == {"old": 1}, "who gave way a moment ago does not come back in the same step"
    assert first.preemptions == 0
    assert worker.scheduler.load().waiting == 2
    events += worker.finish()
    assert {event.cached_tokens for event in events if isinstance(event, Tokens)} == {0}, (
        "what it found when first it ran"
    )
    order = [
        event.sequence_id
        for event in events
        if isinstance(event, Preempted) or (isinstance(event, Tokens) and event.finish)
    ]
    assert order.index("young") < order.index("old") < order.index("new"), "preempted, finished, and then the new one"
    expected, _ = fake.answer(second.prompt_token_ids, [], second.params, (), 28)
    assert second.output_token_ids == expected


def test_the_oldest_is_never_preempted(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=10, max_step_tokens=200)
    everyone = [sequence(f"s{number}", 5, max_tokens=20) for number in range(8)]
    worker.add(*everyone)
    finished = [event.sequence_id for event in worker.finish() if isinstance(event, Tokens) and event.finish]
    assert sum(each.preemptions for each in everyone) > 0
    assert everyone[0].preemptions == 0
    assert finished[0] == "s0"


def test_one_that_is_held_for_the_hand_over_is_not_preempted(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=8)
    held, runs = sequence("held", 16, draws_here=1), sequence("runs", 8, max_tokens=20)
    worker.add(held)
    worker.step()
    assert held.stage is Stage.HELD
    table = tuple(held.block_table)
    worker.add(runs)
    while worker.step()[0]:
        pass
    assert (runs.stage, held.stage) == (Stage.RUNNING, Stage.HELD), "it waits for blocks, it does not take them"
    assert worker.engine.read(table, 16) == fake.kv_of(held.prompt_token_ids)
    assert worker.scheduler.spare_blocks() == 0, "and no reservation takes what it waits for"
    worker.scheduler.release("held")
    worker.finish()
    assert runs.output_token_ids == fake.answer(runs.prompt_token_ids, [], runs.params, (), 32)[0]


def test_a_hand_over_stops_after_its_draw_with_its_blocks_held(fake: SimpleNamespace) -> None:
    worker = Worker(fake, max_step_tokens=8)
    worker.add(sequence("a", 20, draws_here=1))
    told = [event for _ in range(3) for event in worker.step()[1]]
    computed = [(event.first_token, event.num_tokens) for event in told if isinstance(event, Computed)]
    assert computed == [(0, 8), (8, 8), (16, 4)]
    tokens = told[-1]
    assert isinstance(tokens, Tokens)
    assert (tokens.first_index, tokens.finish, tokens.held) == (0, None, True)
    assert (tokens.queued_s, tokens.started_s, tokens.drawn_s) == (0.0, 1.0, 3.5)
    assert worker.step() == ({}, [])
    assert worker.scheduler.counts()["held_blocks"] == 5
    worker.scheduler.release("a")
    worker.scheduler.release("a")
    fake.assert_empty(worker.scheduler)
    assert worker.scheduler.pool.num_cached == 5


def test_the_first_token_may_end_it_where_it_should_be_handed_over(fake: SimpleNamespace) -> None:
    worker = Worker(fake)
    params = SamplingParams(max_tokens=8, forced_token_ids=(3,), stop_token_ids=(3,))
    worker.add(sequence("a", 20, draws_here=1, params=params))
    tokens = worker.finish()[-1]
    assert isinstance(tokens, Tokens)
    assert (tokens.finish, tokens.held) == ("stop", False)


@pytest.mark.parametrize("output", [[], [5, 6]])
@pytest.mark.parametrize(
    ("params", "finish", "count"),
    [
        (SamplingParams(max_tokens=9, forced_token_ids=(1, 2, 7, 4)), "stop", 3),
        (
            SamplingParams(max_tokens=9, forced_token_ids=(1, 2, 7, 4, 8), ignore_eos=True, stop_token_ids=(8,)),
            "stop",
            5,
        ),
        (SamplingParams(max_tokens=3, forced_token_ids=(1, 2, 7)), "stop", 3),
        (SamplingParams(max_tokens=4, forced_token_ids=(1, 2, 9, 9)), "length", 4),
        (SamplingParams(max_tokens=90, forced_token_ids=(9,) * 30), "length", 14),
    ],
)
def test_how_a_sequence_finishes(
    fake: SimpleNamespace, params: SamplingParams, finish: str, count: int, output: list[int]
) -> None:
    """The token that ends it is part of the answer, and a resumed answer counts on."""
    worker = Worker(fake, eos_token_ids=(7,), max_context_tokens=20)
    output = list(params.forced_token_ids[: len(output)])
    resumed = sequence("a", 6, params=params, output=list(output))
    worker.add(resumed)
    told = [event for event in worker.finish() if isinstance(event, Tokens)]
    assert [event.first_index for event in told] == list(range(len(output), count))
    assert [event.finish for event in told] == [None] * (count - len(output) - 1) + [finish]
    assert len(resumed.output_token_ids) == count


def test_prompt_logprobs_take_no_prefix_hit_and_come_once(fake: SimpleNamespace) -> None:
    worker = Worker(fake, max_step_tokens=8)
    worker.add(sequence("a", 17, max_tokens=1))
    worker.finish()
    params = SamplingParams(max_tokens=3, prompt_logprobs=0, ignore_eos=True)
    scored = sequence("a", 17, params=params)
    worker.add(scored)
    told = [event for event in worker.finish() if isinstance(event, Tokens)]
    assert [len(event.prompt_logprobs) for event in told] == [16, 0, 0]
    assert told[0].prompt_logprobs == fake.prompt_scores(scored.prompt_token_ids)
    assert told[0].cached_tokens == 0
    worker.add(sequence("a", 17, max_tokens=1))
    assert [event.cached_tokens for event in worker.finish() if isinstance(event, Tokens)] == [16]


def test_the_prefix_cache_never_crosses_adapters(fake: SimpleNamespace) -> None:
    """The same prompt: each adapter's answer is that of a worker that has seen no other."""

    def run(worker: Worker, name: str, adapter: str) -> tuple[list[int], int]:
        asked = dataclasses.replace(sequence("same", 18), sequence_id=name, adapter=adapter, output_token_ids=[])
        worker.add(asked)
        cached = [event.cached_tokens for event in worker.finish() if isinstance(event, Tokens)]
        return asked.output_token_ids, cached[0]

    adapters = ["", "poems@1", "prose@1", "poems@2"]
    alone = [run(Worker(fake), "a", adapter)[0] for adapter in adapters]
    assert len({tuple(answer) for answer in alone}) == len(adapters)
    worker = Worker(fake, num_blocks=64)
    for round_number, cached in enumerate([0, 16]):
        for adapter, expected in zip(adapters, alone, strict=True):
            assert run(worker, f"{adapter} {round_number}", adapter) == (expected, cached)


def test_a_deadline_ends_waiting_running_and_flying_sequences_but_no_held_one(fake: SimpleNamespace) -> None:
    worker = Worker(fake, max_sequences=2, max_step_tokens=8)
    scheduler = worker.scheduler
    worker.add(sequence("held", 4, draws_here=1, deadline_s=4.0))
    worker.step()
    worker.add(sequence("runs", 4, max_tokens=50, deadline_s=5.0), sequence("flies", 4, max_tokens=50, deadline_s=6.0))
    worker.add(sequence("waits", 4, deadline_s=3.0), sequence("stays", 4))
    assert scheduler.next_deadline_s() == 3.0
    worker.step()
    assert scheduler.expire(2.9) == []
    expired = scheduler.expire(3.0)
    assert [(type(event), event.sequence_id) for event in expired] == [(Failed, "waits")]
    assert isinstance(expired[0], Failed)
    assert isinstance(expired[0].error, DeadlineExceeded)
    assert scheduler.next_deadline_s() == 5.0
    assert [event.sequence_id for event in scheduler.expire(5.5)] == ["runs"]
    plan = scheduler.plan(5.6)
    assert plan is not None
    flying = [block for piece in plan.slices if piece.sequence_id == "flies" for block in piece.block_table]
    assert [event.sequence_id for event in scheduler.expire(6.0)] == ["flies"]
    assert not scheduler.abort("flies", 6.0), "it has ended already"
    scheduler.check()
    assert all(scheduler.pool.references(block) == 1 for block in flying), "the step still writes them"
    told = scheduler.commit(plan, worker.engine.execute(plan), 7.0)
    assert {event.sequence_id for event in told} == {"stays"}
    assert all(scheduler.pool.references(block) == 0 for block in flying)
    scheduler.release("held")
    worker.finish()


def test_what_an_aborted_sequence_computes_is_dropped(fake: SimpleNamespace) -> None:
    worker = Worker(fake)
    scheduler = worker.scheduler
    worker.add(sequence("a", 10), sequence("b", 4))
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert scheduler.abort("a", 0.0)
    assert not scheduler.abort("a", 0.0)
    assert not scheduler.abort("nobody", 0.0)
    with pytest.raises(InvalidParameter):
        scheduler.add(sequence("a", 4), 0.0)
    assert scheduler.counts()["held_blocks"] == 4
    assert {event.sequence_id for event in scheduler.commit(plan, worker.engine.execute(plan), 0.0)} == {"b"}
    assert scheduler.counts()["held_blocks"] == 1
    scheduler.release("b")
    assert scheduler.load().running == 1, "release is for held ones"
    worker.add(sequence("a", 4))
    worker.finish()


def test_one_whose_logits_are_not_finite_fails_alone(fake: SimpleNamespace) -> None:
    worker = Worker(fake)
    worker.add(sequence("sick", 8), sequence("well", 8))
    plan = worker.scheduler.plan(0.0)
    assert plan is not None
    result = worker.engine.execute(plan)
    result = dataclasses.replace(result, drawn=((Drawn(NO_TOKEN),), *result.drawn[1:]))
    failed, *others = worker.scheduler.commit(plan, result, 0.0)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, InternalError)
    assert {event.sequence_id for event in others} == {"well"}
    assert worker.scheduler.prefix.match([*sequence("sick", 8).prompt_token_ids, 1]) == []
    worker.finish()


def test_what_cannot_run_here_is_refused_typed_and_takes_nothing(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=8, max_context_tokens=100, max_waiting=2)
    scheduler = worker.scheduler
    with pytest.raises(ContextTooLong, match="32"):
        scheduler.add(sequence("a", 32), 0.0)
    with pytest.raises(ContextTooLong):
        scheduler.add(sequence("a", 30, output=[1, 2], max_tokens=9), 0.0)
    with pytest.raises(InvalidParameter, match="prompt"):
        scheduler.add(sequence("a", 0), 0.0)
    with pytest.raises(InvalidParameter, match="output_token_ids"):
        scheduler.add(sequence("a", 3, output=[1, 2], max_tokens=2), 0.0)
    fake.assert_empty(scheduler)
    worker.add(sequence("a", 31), sequence("b", 3))
    with pytest.raises(InvalidParameter, match="'a'"):
        scheduler.add(sequence("a", 3), 0.0)
    with pytest.raises(Overloaded):
        scheduler.add(sequence("c", 3), 0.0)
    assert [event.finish for event in worker.finish() if isinstance(event, Tokens) and event.finish] == ["length"] * 2
    for adopted, computed in [(sequence("x", 9, output=[1]), 10), (sequence("x", 31, output=[1]), 31)]:
        block_table = scheduler.pool.allocate(scheduler.pool.blocks_for(computed))
        with pytest.raises(InvalidParameter):
            scheduler.adopt(adopted, block_table, computed, 0.0)
        fake.assert_empty(scheduler)


@pytest.mark.parametrize(
    "changes",
    [{"num_blocks": 0}, {"block_tokens": 0}, {"max_sequences": 17}, {"max_context_tokens": 1}, {"max_waiting": 0}],
)
def test_a_configuration_that_cannot_work_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(InvalidConfiguration, match=next(iter(changes))):
        config(**changes)


def test_load_counts_tokens_that_are_still_to_be_computed(fake: SimpleNamespace) -> None:
    worker = Worker(fake, max_step_tokens=8)
    worker.add(sequence("a", 20), sequence("b", 5))
    assert worker.scheduler.load().waiting_tokens == 25
    worker.step()
    load = worker.scheduler.load()
    assert (load.waiting, load.running, load.waiting_tokens, load.free_blocks, load.total_blocks) == (1, 1, 17, 27, 32)
    assert worker.scheduler.abort("b", 0.0)
    assert worker.scheduler.load().waiting_tokens == 12
    worker.finish()


def test_ended_sequences_do_not_pile_up_behind_far_deadlines(fake: SimpleNamespace) -> None:
    worker = Worker(fake)
    for number in range(500):
        worker.add(sequence(f"s{number}", 3, deadline_s=1e9))
        assert worker.scheduler.abort(f"s{number}", 0.0)
        worker.scheduler.check()  # bounds the heap
    assert worker.scheduler.next_deadline_s() is None


def test_the_table_of_transitions_is_enforced() -> None:
    for stage, to in itertools.product(Stage, Stage):
        if to in TRANSITIONS[stage]:
            assert advance(stage, to) is to
        else:
            with pytest.raises(AssertionError, match=to.value):
                advance(stage, to)
    reachable = {Stage.NEW}
    for _ in Stage:
        reachable |= {to for stage in reachable for to in TRANSITIONS[stage]}
    assert reachable == set(Stage)


def test_a_sequence_that_is_taken_out_is_held_once_the_step_has_come_back(fake: SimpleNamespace) -> None:
    """Also with guesses in the step; put back, it goes on, and answers as if nothing had been."""
    guessing = SamplingParams(max_tokens=30, ignore_eos=True, speculation=Speculation("draft_model", 3, 2))
    worker = Worker(fake, draft_model=True)
    worker.add(sequence("stays", 5, 20), sequence("moves", 6, 30, params=guessing))
    worker.step()
    prompt = worker.scheduler.sequence("moves").prompt_token_ids
    expected, _ = fake.answer(prompt, [], guessing, (), 100)
    told: list[Event] = []
    for _ in range(3):
        plan = worker.scheduler.plan(worker.now_s)
        assert worker.scheduler.take_out("moves") is False, "a step computes it"
        told += worker.scheduler.commit(plan, worker.engine.execute(plan), worker.now_s)
        drawn = [event for event in told if isinstance(event, Tokens) and event.sequence_id == "moves"]
        assert drawn[-1].held
        assert "moves" not in worker.step()[0]
        worker.scheduler.put_back("moves")
        told += worker.step()[1]
    told += worker.finish()
    drawn = [event for event in told if isinstance(event, Tokens) and event.sequence_id == "moves"]
    assert [each.held for each in drawn].count(True) == 3
    known = worker_tokens = [each.token_id for event in drawn for each in event.drawn]
    assert known == expected[-len(worker_tokens) :] and len(known) >= len(expected) - 4


def test_one_that_was_preempted_is_taken_out_at_once_and_put_back_in_line(fake: SimpleNamespace) -> None:
    worker = Worker(fake, num_blocks=8, max_context_tokens=32)
    worker.add(sequence("old", 12, 16), sequence("young", 12, 12))
    while not any(isinstance(event, Preempted) for event in worker.step()[1]):
        assert worker.scheduler.take_out("young") is False
        worker.scheduler.put_back("young")
    assert worker.scheduler.take_out("young") is True
    assert worker.scheduler.counts()["waiting"] == 0
    worker.scheduler.check()
    worker.scheduler.put_back("young")
    assert worker.scheduler.counts()["waiting"] == 1
    ends = [event.sequence_id for event in worker.finish() if isinstance(event, Tokens) and event.finish]
    assert ends == ["old", "young"]


def test_the_deadline_of_one_that_was_put_back_counts_again(fake: SimpleNamespace) -> None:
    worker = Worker(fake)
    worker.add(sequence("a", 4, 90, deadline_s=50.0))
    for _ in range(200):  # its second entries in the heap are swept
        worker.scheduler.take_out("a")
        if worker.scheduler.sequence("a").drawn_here < 40:
            worker.step()
        assert worker.scheduler.expire(49.0) == []
        worker.scheduler.put_back("a")
        worker.scheduler.check()
    assert worker.scheduler.take_out("a") is False
    plan = worker.scheduler.plan(49.0)
    worker.scheduler.commit(plan, worker.engine.execute(plan), 49.0)
    assert worker.scheduler.expire(60.0) == [], "held: the move has clocks of its own"
    worker.scheduler.put_back("a")
    (event,) = worker.scheduler.expire(60.0)
    assert isinstance(event, Failed) and isinstance(event.error, DeadlineExceeded)
    fake.assert_empty(worker.scheduler)
