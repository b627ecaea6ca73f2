"""What bench.speculation computes, on sizes whose result is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from stepper import Stepper
from tiny_llama import Shape, make_llama

from bench.speculation import acceptance, distributions, race_agreement, rounded, run
from bench.timed_loop import TimedLoop
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from spec.sampling import Speculation

OPTIONS = EngineOptions(dtype="float32", device="cpu", threads=1, block_tokens=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model") / "model", Shape("tiny", hidden_size=64))


def test_acceptance_of_distributions_that_are_known() -> None:
    p, q = np.log([[0.5, 0.3, 0.2]]), np.log([[0.2, 0.3, 0.5]])
    found = acceptance(p, q, (0.0, 1.0))
    assert set(found[0.0].values()) == {0.0}
    # Of exponentials over p and q the same token's is least: 1 / max of the ratios, summed over the tokens.
    expected = 1 / (1 + 1.5 + 2.5) + 1 / (1 + 5 / 3 + 5 / 3) + 1 / (2.5 + 1.5 + 1)
    assert found[1.0]["race"] == pytest.approx(expected)
    assert found[1.0]["drawn"] == pytest.approx(expected, abs=0.25)  # 100 draws
    assert found[1.0]["min(p, q)"] == pytest.approx(0.7)
    assert all(rate == pytest.approx(1.0) for rate in acceptance(p, p, (0.7,))[0.7].values())


def test_a_race_agrees_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    p, q = generator.dirichlet(np.ones(17), size=2)
    numbers = generator.exponential(size=(200_000, 17))
    same = ((numbers / p).argmin(axis=1) == (numbers / q).argmin(axis=1)).mean()
    assert race_agreement(p, q) == pytest.approx(same, abs=0.005)  # four standard errors


def test_distributions_are_those_of_the_engine(model: Path) -> None:
    token_ids = [(7 * i + 3) % 431 for i in range(40)]
    expected = Stepper(Engine(open_model(model), OPTIONS, 12)).run(token_ids)[:-1]
    np.testing.assert_array_equal(distributions(model, OPTIONS, token_ids), expected)


def test_rounding_leaves_few_values(model: Path, tmp_path: Path) -> None:
    token_ids = [(7 * i + 3) % 431 for i in range(20)]
    exact = distributions(model, OPTIONS, token_ids)
    errors = [
        np.abs(distributions(rounded(model, tmp_path / str(bits), bits), OPTIONS, token_ids) - exact).mean()
        for bits in (3, 6, 10)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_a_run_counts_what_was_guessed(model: Path) -> None:
    loop = TimedLoop(open_model(model), OPTIONS, max_sequences=3, max_tokens=90, max_step_tokens=128)
    prompt = [5, 6, 7, 8] * 6
    plain, answers = run(loop, prompt, 3, 40, None)
    guessed, same = run(loop, prompt, 3, 40, Speculation("prompt_lookup", 4, 1))
    assert same == answers
    assert [len(answer) for answer in answers] == [40, 40, 40]
    assert plain.num_tokens == plain.num_steps * 3 == 117
    assert plain.proposed_tokens == 0
    assert guessed.accepted_tokens <= guessed.proposed_tokens
    assert guessed.num_steps < plain.num_steps or guessed.accepted_tokens == 0
