"""Draws by ranks that hold a part of the vocabulary each, over real processes: the token is the one-rank path's."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from ranks import _CONTEXT

from engine.groups import join
from engine.sampling import draw, token_logprobs
from engine.vocabulary_parallel import Sampler
from scheduler.plan import NO_TOKEN, Draw, Drawn
from service.ports import free_port
from spec.constraint import Constraint
from spec.layout import ParallelLayout
from spec.sampling import SamplingParams
from spec.shard import RankShard, split

LIMIT_S = 120.0
# Runs of a tile of the race or less, of whole tiles, of different lengths.
CASES = [(2, 431), (2, 2048), (4, 131), (4, 1021), (4, 2560), (4, 40_003)]


class Ranks:
    """Processes that answer (logits, draws) and (logits, asked) with what their Sampler finds."""

    def __init__(self, connections: list[Any], runs: list[range]) -> None:
        self.connections, self.runs = connections, runs

    def ask(self, verb: str, logits: torch.Tensor, questions: list[Any], masks: list[Any] | None = None) -> list[Any]:
        """What every rank finds: the same."""
        for connection, run in zip(self.connections, self.runs, strict=True):
            more = () if masks is None else ([mask[run.start : run.stop] for mask in masks],)
            connection.send((verb, logits[:, run.start : run.stop].numpy(), (questions, *more)))
        answers = []
        for connection in self.connections:
            assert connection.poll(LIMIT_S)
            answers.append(connection.recv())
            if isinstance(answers[-1], BaseException):
                raise answers[-1]
        assert all(answer == answers[0] for answer in answers)
        return answers[0]

    def draw(self, logits: torch.Tensor, draws: list[Draw], allowed: list[Any] | None = None) -> list[Drawn]:
        return self.ask("draw", logits, draws, allowed)


@pytest.fixture(scope="module", params=CASES, ids=[f"tp{tp}-{vocab}" for tp, vocab in CASES])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    tp, vocab = request.param
    runs = [split(vocab, tp, index) for index in range(tp)]
    address = f"127.0.0.1:{free_port()}"
    connections, processes = [], []
    for index in range(tp):
        here, there = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_rank, args=(there, tp, index, vocab, address), daemon=True)
        process.start()
        there.close()
        connections.append(here)
        processes.append(process)
    yield Ranks(connections, runs)
    for connection in connections:
        connection.close()
    for process in processes:
        process.join(10.0)
        assert not process.is_alive()


def _rank(connection: Any, tp: int, index: int, vocab: int, address: str) -> None:
    torch.set_num_threads(1)
    none = range(0)
    layout = ParallelLayout(tp=tp)
    own = split(vocab, tp, index)
    shard = RankShard(layout, index, 0, 0, index, none, none, none, none, own, own, (), none)
    groups = join(shard, address, torch.device("cpu"), timeout_s=60.0)
    sampler = Sampler(groups, vocab)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            verb, logits, questions = connection.recv()
            ask = sampler.draw if verb == "draw" else sampler.token_logprobs
            try:
                connection.send(ask(torch.from_numpy(logits), *questions))
            except BaseException as error:
                connection.send(error)
    groups.close()


def logits_of(seed: int, rows: int, vocab: int, scale: float) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32))


def any_params(generator: random.Random, vocab: int) -> SamplingParams:
    return SamplingParams(
        temperature=generator.choice([0.0, 0.3, 1.0, 2.5]),
        top_k=generator.choice([0, 0, 0, 1, 5, vocab // 2, vocab - 1, vocab, 10 * vocab]),
        top_p=generator.choice([1.0, 1.0, 0.999, 0.95, 0.5, 1e-6]),
        min_p=generator.choice([0.0, 0.0, 1e-5, 0.02, 0.3, 1.0]),
        repetition_penalty=generator.choice([1.0, 1.3, 0.7]),
        presence_penalty=generator.choice([0.0, 1.1, -0.8]),
        frequency_penalty=generator.choice([0.0, 0.6, -0.4]),
        logit_bias=MappingProxyType({generator.randrange(vocab): generator.uniform(-5, 5) for _ in range(3)}),
        seed=generator.getrandbits(64),
        logprobs=generator.choice([None, None, 0, 3]),
        forced_token_ids=generator.choice([(), (), (), (vocab - 1,) * 6]),
    )


def close(found: list[Drawn], expected: list[Drawn]) -> None:
    assert [each.token_id for each in found] == [each.token_id for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-12)
            assert [t for t, _ in one.logprobs.top] == [t for t, _ in other.logprobs.top]
            np.testing.assert_allclose(
                [value for _, value in one.logprobs.top], [value for _, value in other.logprobs.top], rtol=0, atol=1e-12
            )


def test_every_option_draws_what_one_rank_draws(ranks: Ranks) -> None:
    vocab = ranks.runs[-1].stop
    for seed in range(30):
        generator = random.Random(seed)
        logits = logits_of(seed, 16, vocab, generator.choice([0.1, 3.0, 30.0]))
        draws = []
        for _ in range(16):
            num_prompt = generator.randrange(1, 20)
            history = tuple(generator.randrange(vocab) for _ in range(num_prompt + generator.randrange(9)))
            draws.append(Draw(any_params(generator, vocab), len(history), num_prompt, history))
        close(ranks.draw(logits, draws), draw(logits, draws))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 7}, {"temperature": 0.0}])
def test_a_step_of_one_kind(ranks: Ranks, options: dict[str, float]) -> None:
    vocab = ranks.runs[-1].stop
    for seed in range(5):
        logits = logits_of(seed, 40, vocab, 2.0)
        draws = [Draw(SamplingParams(seed=seed, **options), 11 + row, 5, ()) for row in range(40)]  # type: ignore[arg-type]
        assert ranks.draw(logits, draws) == draw(logits, draws)


def test_a_constraint_is_each_ranks_part_of_it(ranks: Ranks) -> None:
    """Some ranks may draw none of theirs; some rows admit one token, and some none at all."""
    vocab = ranks.runs[-1].stop
    for seed in range(10):
        generator, chance = random.Random(seed), np.random.default_rng(seed)
        logits = logits_of(seed, 24, vocab, 3.0)
        draws = [Draw(any_params(generator, vocab), 9 + row, 5, (1,) * (9 + row)) for row in range(24)]
        draws = [each._replace(params=unforced(each.params)) for each in draws]
        allowed = [chance.random(vocab) < generator.choice([0.5, 2.5 / vocab]) for _ in draws]
        allowed[3][:], allowed[4][: ranks.runs[-1].start], allowed[5][ranks.runs[0].stop :] = False, False, False
        found = ranks.draw(logits, draws, allowed)
        close(found, draw(logits, draws, allowed))
        for each, mask in zip(found, allowed, strict=True):
            assert mask[each.token_id] if mask.any() else each.token_id == NO_TOKEN


def unforced(params: SamplingParams) -> SamplingParams:
    return dataclasses.replace(params, forced_token_ids=(), constraint=Constraint("regex", ("",)))


def test_ties_go_to_the_lower_id(ranks: Ranks) -> None:
    vocab = ranks.runs[-1].stop
    logits = torch.zeros(60, vocab)
    equal = [ranks.runs[0].stop - 1, ranks.runs[-1].start, vocab - 1]
    logits[:, equal] = 2.0
    choices = [
        {"temperature": 0.0},
        {"top_k": 2},
        {"temperature": 0.01, "top_p": 0.5},
        {"temperature": 0.0, "logprobs": 3},
    ]
    draws = [Draw(SamplingParams(seed=1, **choices[row % 4]), 9 + row, 5, ()) for row in range(60)]  # type: ignore[arg-type]
    found = ranks.draw(logits, draws)
    close(found, draw(logits, draws))
    assert {each.token_id for each in found[0::4]} == {equal[0]}
    assert {each.token_id for each in found[1::4]} == set(equal[:2])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_no_numbers_fails_alone(ranks: Ranks, poison: float) -> None:
    vocab = ranks.runs[-1].stop
    logits = logits_of(3, 8, vocab, 2.0)
    for greedy in (True, False):
        params = [SamplingParams(temperature=0.0 if greedy else row % 2, seed=4, top_p=0.9) for row in range(8)]
        draws = [Draw(params[row], 9, 5, ()) for row in range(8)]
        poisoned = logits.clone()
        poisoned[1, vocab // 2], poisoned[6, vocab - 1] = poison, poison
        poisoned[3] = -float("inf")
        found = ranks.draw(poisoned, draws)
        assert found == draw(poisoned, draws)
        assert [row for row, each in enumerate(found) if each.token_id == NO_TOKEN] == [1, 3, 6]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_no_rank_hides_a_row_that_is_no_numbers_behind_a_mask(ranks: Ranks, poison: float) -> None:
    vocab = ranks.runs[-1].stop
    logits, mask = logits_of(3, 4, vocab, 2.0), np.ones(vocab, bool)
    mask[vocab // 2] = False
    logits[2, vocab // 2] = poison
    draws = [Draw(SamplingParams(temperature=row % 2, seed=4, top_p=0.9), 9, 5, ()) for row in range(4)]
    found = ranks.draw(logits, draws, [mask] * 4)
    assert found == draw(logits, draws, [mask] * 4)
    assert [row for row, each in enumerate(found) if each.token_id == NO_TOKEN] == [2]


def test_a_rank_whose_part_cannot_be_drawn(ranks: Ranks) -> None:
    vocab = ranks.runs[-1].stop
    logits = logits_of(5, 30, vocab, 2.0)
    for run in ranks.runs[1:]:
        logits[:, run.start : run.stop] = -float("inf")
    choices = [{}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 3}, {"temperature": 0.0, "presence_penalty": 1.0}]
    draws = [Draw(SamplingParams(seed=2, **choices[row % 5]), 9 + row, 5, (1,) * 9) for row in range(30)]  # type: ignore[arg-type]
    assert ranks.draw(logits, draws) == draw(logits, draws)


def test_weights_that_underflow(ranks: Ranks) -> None:
    vocab = ranks.runs[-1].stop
    logits = logits_of(7, 12, vocab, 200.0)
    choices = [{}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_p": 0.999, "top_k": 40}]
    draws = [Draw(SamplingParams(temperature=0.5, seed=row, **choices[row % 4]), 10, 5, ()) for row in range(12)]  # type: ignore[arg-type]
    assert ranks.draw(logits, draws) == draw(logits, draws)


def test_whole_rows_of_log_probabilities(ranks: Ranks) -> None:
    vocab = ranks.runs[-1].stop
    logits = logits_of(8, 3, vocab, 2.0)
    asked = [(0, vocab), (vocab - 1, 0), (vocab // 3, vocab // 2)]
    found = ranks.ask("logprobs", logits, asked)
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, (token_id, num_top) in enumerate(asked):
        assert found[row].logprob == pytest.approx(float(expected[row, token_id]), rel=1e-12)
        assert [t for t, _ in found[row].top] == [t for t, _ in token_logprobs(logits[row].numpy(), 0, num_top).top]
        values = [value for _, value in found[row].top]
        np.testing.assert_allclose(values, expected[row, [t for t, _ in found[row].top]].numpy(), rtol=1e-12)


def test_an_empty_step_draws_nothing(ranks: Ranks) -> None:
    assert ranks.draw(torch.empty(0, ranks.runs[-1].stop), []) == []
