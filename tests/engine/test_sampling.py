"""Draws against transformers' own logits processors and a race among what they leave, in float64."""

from __future__ import annotations

import dataclasses
import math
import random
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from split_mix import number_of
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sampling import draw
from scheduler.plan import NO_TOKEN, Draw
from spec.sampling import SamplingParams

VOCAB = 431


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy((np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32))


def one(params: SamplingParams, logits: torch.Tensor, position: int = 10, history: tuple[int, ...] = ()) -> int:
    return draw(logits, [Draw(params, position, 5, history)])[0].token_id


def penalised(params: SamplingParams, logits: torch.Tensor, history: tuple[int, ...], num_prompt: int) -> torch.Tensor:
    """[1, V] float64, each score rounded once to float32."""
    scores = logits.double().clone()
    for token_id, bias in params.logit_bias.items():
        scores[0, token_id] += bias
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(torch.tensor([history]), scores)
    for token_id in range(scores.shape[1]):
        count = history[num_prompt:].count(token_id)
        scores[0, token_id] -= params.frequency_penalty * count + (params.presence_penalty if count else 0.0)
    return scores.float().double()


def probabilities(
    params: SamplingParams, logits: torch.Tensor, history: tuple[int, ...], num_prompt: int
) -> torch.Tensor:
    """[V] float64: every step spelled out; filters by transformers."""
    filters: list[Any] = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        filters.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        filters.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        filters.append(MinPLogitsWarper(params.min_p))
    scores = penalised(params, logits, history, num_prompt)
    return torch.softmax(LogitsProcessorList(filters)(torch.tensor([[0]]), scores), dim=-1)[0]


def oracle(
    params: SamplingParams, logits: torch.Tensor, position: int, history: tuple[int, ...], num_prompt: int
) -> int:
    if params.temperature == 0.0:
        return int(penalised(params, logits, history, num_prompt).argmax())
    race = {
        token_id: -math.log(number_of(params.seed, position, token_id)) / probability
        for token_id, probability in enumerate(probabilities(params, logits, history, num_prompt).tolist())
        if probability > 0.0
    }
    return min(race, key=race.__getitem__)


@pytest.mark.parametrize("seed", range(60))
def test_draws_are_those_of_the_oracle(seed: int) -> None:
    generator = random.Random(seed)
    params = SamplingParams(
        temperature=generator.choice([0.0, 0.3, 1.0, 2.5]),
        top_k=generator.choice([0, 1, 5, 60, VOCAB, 10_000]),
        top_p=generator.choice([1.0, 0.95, 0.5, 1e-6]),
        min_p=generator.choice([0.0, 0.02, 0.3, 1.0]),
        repetition_penalty=generator.choice([1.0, 1.3, 0.7]),
        presence_penalty=generator.choice([0.0, 1.1, -0.8]),
        frequency_penalty=generator.choice([0.0, 0.6, -0.4]),
        logit_bias=MappingProxyType({generator.randrange(VOCAB): generator.uniform(-5, 5) for _ in range(3)}),
        seed=generator.getrandbits(64),
    )
    history = tuple(generator.randrange(40) for _ in range(25))
    logits = logits_of(seed)
    for position in range(25, 45):
        each = Draw(params, position, 9, history)
        found = draw(logits, [each])[0].token_id
        assert found == oracle(params, logits, position, history, 9), params


CHI_SQUARES = {  # 20,000 draws from 24 tokens: the 1e-6 quantile for 23 degrees of freedom is 74, fewer have less
    "temperature": SamplingParams(temperature=0.8, seed=2026),
    "hot": SamplingParams(temperature=2.5, seed=1),
    "top-k": SamplingParams(temperature=1.0, top_k=7, seed=2),
    "top-p": SamplingParams(temperature=1.0, top_p=0.8, seed=3),
    "min-p": SamplingParams(temperature=1.0, min_p=0.1, seed=4),
    "all filters": SamplingParams(temperature=1.3, top_k=15, top_p=0.9, min_p=0.05, seed=5),
    "penalties": SamplingParams(
        temperature=1.0, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.3, seed=6
    ),
    "bias": SamplingParams(temperature=1.0, logit_bias=MappingProxyType({3: 1.5, 20: -2.0}), seed=7),
}
HISTORY = (3, 3, 5, 7, 7, 7, 11)


def chi_square(drawn_with: SamplingParams, expected_of: SamplingParams) -> float:
    """Of draws at rising positions, against the float64 distribution that transformers' processors leave."""
    logits, rows = logits_of(3, vocab=24, scale=1.0), 20_000
    history = HISTORY if drawn_with.has_penalties else ()
    draws = [Draw(drawn_with, position, 2, history) for position in range(2, rows + 2)]
    counts = np.bincount([each.token_id for each in draw(logits.expand(rows, -1), draws)], minlength=24)
    expected = probabilities(expected_of, logits, HISTORY, 2).numpy() * rows
    assert not counts[expected == 0.0].any()
    counts, expected = counts[expected > 0.0], expected[expected > 0.0]
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("case", CHI_SQUARES)
def test_draws_follow_the_distribution(case: str) -> None:
    assert chi_square(CHI_SQUARES[case], CHI_SQUARES[case]) < 74


def test_another_temperature_is_noticed() -> None:
    """The test above can fail: the same statistic against a neighbouring temperature."""
    params = CHI_SQUARES["temperature"]
    assert chi_square(dataclasses.replace(params, temperature=0.88), params) > 74


def test_draws_over_seeds_follow_the_distribution_too() -> None:
    logits, rows = logits_of(3, vocab=24, scale=1.0), 20_000
    draws = [Draw(SamplingParams(temperature=1.0, seed=seed), 9, 2, ()) for seed in range(rows)]
    counts = np.bincount([each.token_id for each in draw(logits.expand(rows, -1), draws)], minlength=24)
    expected = torch.softmax(logits[0].double(), dim=0).numpy() * rows
    assert ((counts - expected) ** 2 / expected).sum() < 74


def test_neighbouring_positions_and_seeds_are_independent() -> None:
    """Chi-square over pairs of draws, 8 tokens: the 1e-6 quantile for 63 degrees of freedom is 133."""
    logits, rows = logits_of(5, vocab=8, scale=0.5), 20_000
    expected = np.outer(*[torch.softmax(logits[0].double(), dim=0).numpy()] * 2).ravel() * rows
    for step in ((0, 1), (1, 0)):
        pairs = []
        for place in range(2):
            draws = [
                Draw(SamplingParams(seed=row // 100 + place * step[0]), 3 * (row % 100) + place * step[1], 0, ())
                for row in range(rows)
            ]
            pairs.append(np.array([each.token_id for each in draw(logits.expand(rows, -1), draws)]))
        if step == (1, 0):  # every second seed, or each would be in two pairs
            pairs = [each.reshape(-1, 100)[::2].ravel() for each in pairs]
        counts = np.bincount(pairs[0] * 8 + pairs[1], minlength=64)
        scale = counts.sum() / rows
        assert ((counts - expected * scale) ** 2 / (expected * scale)).sum() < 133


def test_a_row_does_not_see_its_neighbours() -> None:
    logits = logits_of(4, rows=16, vocab=1021)
    choices = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.2, top_p=0.9, seed=5),
        SamplingParams(temperature=0.7, top_k=40, seed=6, logprobs=3),
        SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.2),
    ]
    draws = [Draw(choices[i % 4], 20 + i, 3, tuple(range(20 + i))) for i in range(16)]
    together = draw(logits, draws)
    assert [draw(logits[i : i + 1], [draws[i]])[0] for i in range(16)] == together
    order = list(range(16))
    random.Random(0).shuffle(order)
    assert draw(logits[order], [draws[i] for i in order]) == [together[i] for i in order]


def test_ties_go_to_the_lower_id() -> None:
    logits = torch.zeros(1, 600)
    logits[0, [17, 300, 301, 599]] = 2.0
    assert one(SamplingParams(temperature=0.0), logits) == 17
    assert one(SamplingParams(temperature=0.0, logprobs=0), logits) == 17
    drawn = draw(logits, [Draw(SamplingParams(temperature=0.0, logprobs=3), 10, 5, ())])[0]
    assert drawn.logprobs is not None
    assert [token_id for token_id, _ in drawn.logprobs.top] == [17, 300, 301]
    for position in range(40):
        assert one(SamplingParams(temperature=1.0, top_k=2, seed=1), logits, position + 5) in (17, 300)
        assert one(SamplingParams(temperature=0.01, top_p=0.7, seed=1), logits, position + 5) in (17, 300, 301)


def test_logprobs_are_the_models_own() -> None:
    """Before bias, penalties and temperature; of all the vocabulary; against torch in float64."""
    logits = logits_of(8)
    params = SamplingParams(
        temperature=1.7, repetition_penalty=1.5, logit_bias={3: 50.0}, logprobs=VOCAB, top_k=1, seed=1
    )
    drawn = draw(logits, [Draw(params, 10, 5, (1, 2, 3))])[0]
    expected = torch.log_softmax(logits.double(), dim=-1)[0]
    assert drawn.token_id == 3
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(expected[3]), rel=1e-12)
    ids, values = zip(*drawn.logprobs.top, strict=True)
    assert list(ids) == expected.argsort(descending=True).tolist()
    np.testing.assert_allclose(values, expected[list(ids)].numpy(), rtol=1e-12)
    none = draw(logits, [Draw(dataclasses.replace(params, logprobs=0), 10, 5, (1, 2, 3))])[0]
    assert none.logprobs is not None
    assert none.logprobs.top == ()


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, logprobs=2, seed=3)]
)
def test_forced_tokens_come_first(params: SamplingParams) -> None:
    forced = dataclasses.replace(params, forced_token_ids=(400, 7))
    logits = logits_of(9)
    free = draw(logits, [Draw(params, 7, 5, ())])[0].token_id
    found = [draw(logits, [Draw(forced, position, 5, ())])[0] for position in (5, 6, 7)]
    assert [each.token_id for each in found] == [400, 7, free]
    if params.logprobs is not None:
        assert found[0].logprobs is not None
        assert found[0].logprobs.logprob == pytest.approx(float(torch.log_softmax(logits.double(), -1)[0, 400]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_row_alone(temperature: float, poison: float) -> None:
    logits = logits_of(11, rows=3)
    draws = [Draw(SamplingParams(temperature=temperature, seed=4, forced_token_ids=(1, 2, 3, 4, 5, 6)), 9, 5, ())] * 3
    clean = draw(logits, draws)
    logits[1, 30] = poison
    found = draw(logits, draws)
    assert [found[0], found[2]] == [clean[0], clean[2]]
    assert found[1].token_id == NO_TOKEN


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_mask_does_not_hide_logits_that_are_no_numbers(poison: float) -> None:
    logits, mask = logits_of(11, rows=2), np.ones(VOCAB, bool)
    mask[30] = False
    logits[1, 30] = poison
    draws = [Draw(SamplingParams(temperature=1.0, seed=4, logprobs=2), 9, 5, ())] * 2
    found = draw(logits, draws, [mask, mask])
    assert found[0].token_id not in (NO_TOKEN, 30)
    assert found[1].token_id == NO_TOKEN


def test_an_empty_step_draws_nothing() -> None:
    assert draw(torch.empty(0, VOCAB), []) == []
