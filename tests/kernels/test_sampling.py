"""The race and its filters against float64 by NumPy, equal scores, empty rows, and the numbers that race."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from split_mix import number_of, split_mix
from torch import Tensor

from kernels.cpu import library as library_module
from kernels.cpu.library import Library
from kernels.sampling import MASS_BITS, NO_TOKEN, gumbel, masses, options_of, reference, sample, stream_of
from kernels.sampling import split_mix as split_mix_output

Sample = Callable[..., tuple[Tensor, Tensor]]
OFF = (1.0, 0, 1.0, 0.0)


@pytest.fixture(params=["reference", "library"])
def run(request: pytest.FixtureRequest, library: Library) -> Sample:
    if request.param == "reference":
        return reference

    def run(scores: Tensor, options: Tensor, streams: Tensor, first_id: int = 0, **more: Any) -> tuple[Tensor, Tensor]:
        return library.sample(scores, options, streams, first_id, more.get("ids"), more.get("totals"))

    return run


def rows_of(choices: list[tuple[float, int, float, float]]) -> Tensor:
    return torch.tensor([options_of(*choice) for choice in choices], dtype=torch.float64)


def scores_of(generator: random.Random, num_rows: int, vocab: int) -> Tensor:
    """Flat and steep, with ties, with rows in order, with tokens that cannot be drawn."""
    scores = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(generator.getrandbits(32)))
    scores *= generator.choice([0.1, 1.0, 3.0, 30.0])
    kind = generator.randrange(5)
    if kind == 0:
        scores = scores.round()
    elif kind == 1:
        scores = scores.sort(dim=1, descending=generator.random() < 0.5).values
    elif kind == 2:
        scores[:, generator.randrange(vocab) :: 2] = -math.inf
    return scores


def expected_row(scores: NDArray[np.float64], choice: tuple[float, int, float, float], seed: int, at: int) -> int:
    temperature, top_k, top_p, min_p = choice
    if not math.isfinite(scores.max()):
        return NO_TOKEN
    if temperature == 0.0:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")
    kept = order[: top_k or None]
    weights = np.exp((scores[kept] - scores.max()) / temperature)
    if top_p < 1.0:
        kept = kept[: int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1]
    kept = kept[np.exp((scores[kept] - scores.max()) / temperature) >= min_p * (1 - 1e-12)]
    keys = [scores[token] / temperature - math.log(-math.log(number_of(seed, at, int(token)))) for token in kept]
    return int(kept[int(np.argmax(keys))])


@pytest.mark.parametrize("first", range(0, 80, 20))
def test_agrees_with_float64(run: Sample, first: int) -> None:
    for case in range(first, first + 20):
        generator = random.Random(case)
        vocab = generator.choice([1, 2, 6, 63, 64, 65, 123, 431, 2011])
        num_rows = generator.choice([1, 3, 6])
        choices = [
            (
                generator.choice([0.0, 0.3, 1.0, 2.5]),
                generator.choice([0, 0, 1, 5, 60, vocab, 10_000]),
                generator.choice([1.0, 1.0, 0.95, 0.5, 1e-6]),
                generator.choice([0.0, 0.0, 0.02, 0.3, 1.0]),
            )
            for _ in range(num_rows)
        ]
        scores = scores_of(generator, num_rows, vocab)
        at = [(generator.getrandbits(64), generator.randrange(100_000)) for _ in range(num_rows)]
        token_ids, keys = run(scores, rows_of(choices), torch.tensor([stream_of(*each) for each in at]))
        expected = [expected_row(scores[row].double().numpy(), choices[row], *at[row]) for row in range(num_rows)]
        assert token_ids.tolist() == expected, choices
        assert (keys.isfinite() == (token_ids != NO_TOKEN)).all()


def test_the_numbers_are_those_of_split_mix() -> None:
    """The first outputs from 1234567, as its authors' C program prints them."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [split_mix_output(1234567, count) for count in range(1, 6)] == known
    assert [word for word, _ in zip(split_mix(1234567), range(5), strict=False)] == known
    for seed, position in ((0, 0), (2**64 - 1, 7), (5, 2**33)):
        found = gumbel(torch.tensor([stream_of(seed, position)]), torch.tensor([0, 1, 77, 200_000]))[0]
        expected = [-math.log(-math.log(number_of(seed, position, token))) for token in (0, 1, 77, 200_000)]
        np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_seeds_and_positions_count_in_every_bit() -> None:
    assert len({stream_of(1 << bit, 0) for bit in range(64)}) == 64
    assert len({stream_of(0, 1 << bit) for bit in range(40)}) == 40
    assert stream_of(1 << 64, 3) == stream_of(0, 3)
    assert stream_of(-1, 3) == stream_of((1 << 64) - 1, 3)


@pytest.mark.parametrize("along", ["seed", "position", "token"])
def test_numbers_are_uniform_along_each_argument(along: str) -> None:
    """Kolmogorov-Smirnov at 1e-6, and neighbours in no relation (serial correlation within five standard errors)."""
    count = 4000
    if along == "token":
        values = gumbel(torch.tensor([stream_of(3, 12)]), torch.arange(count))[0]
    else:
        at = [(k, 12) if along == "seed" else (99, k) for k in range(count)]
        values = gumbel(torch.tensor([stream_of(*each) for each in at]), torch.tensor([7]))[:, 0]
    uniform = torch.exp(-torch.exp(-values)).numpy()
    distance = np.abs(np.sort(uniform) - (np.arange(count) + 0.5) / count).max()
    assert distance < 2.7 / math.sqrt(count)
    assert abs(np.corrcoef(uniform[1:], uniform[:-1])[0, 1]) < 5 / math.sqrt(count)


def test_equal_scores_go_by_their_id(run: Sample) -> None:
    scores = torch.zeros(1, 600)
    scores[0, [17, 300, 301, 599]] = 2.0
    drawn: dict[tuple[float, int, float, float], set[int]] = {}
    for choice in ((0.0, 0, 1.0, 0.0), (1.0, 2, 1.0, 0.0), (0.01, 0, 0.7, 0.0), (0.01, 0, 1.0, 1.0)):
        for position in range(60):
            token_ids, _ = run(scores, rows_of([choice]), torch.tensor([stream_of(1, position)]))
            drawn.setdefault(choice, set()).add(int(token_ids[0]))
    assert list(drawn.values()) == [{17}, {17, 300}, {17, 300, 301}, {17, 300, 301, 599}]


def test_rows_that_are_no_numbers_fail_alone(run: Sample) -> None:
    for choice in (OFF, (0.0, 0, 1.0, 0.0), (1.0, 5, 0.9, 0.1), (1.0, 0, 0.9, 0.0)):
        scores = torch.randn(5, 123, generator=torch.Generator().manual_seed(1))
        options, streams = rows_of([choice] * 5), torch.arange(5)
        clean, _ = run(scores, options, streams)
        scores[1, 122], scores[2, 3], scores[3] = math.nan, math.inf, -math.inf
        token_ids, keys = run(scores, options, streams)
        assert token_ids[[0, 4]].tolist() == clean[[0, 4]].tolist()
        assert token_ids[1:4].tolist() == [NO_TOKEN] * 3
        assert keys[1].isnan()
        assert not keys[2].isfinite()
        assert keys[3] == -math.inf


def test_parts_of_a_vocabulary_race_to_the_token_of_the_whole(run: Sample) -> None:
    scores = 2 * torch.randn(40, 1021, generator=torch.Generator().manual_seed(2))
    options, streams = rows_of([OFF] * 40), torch.tensor([stream_of(4, row) for row in range(40)])
    whole, best = run(scores, options, streams)
    parts = [run(scores[:, start : start + 300], options, streams, first_id=start) for start in range(0, 1021, 300)]
    keys = torch.stack([keys for _, keys in parts])
    assert torch.equal(keys.max(dim=0).values, best)
    assert torch.stack([ids for ids, _ in parts]).gather(0, keys.argmax(dim=0)[None])[0].tolist() == whole.tolist()


def test_what_can_pass_is_enough_for_the_filters(run: Sample) -> None:
    scores = 2 * torch.randn(1, 1021, generator=torch.Generator().manual_seed(3))
    greatest = float(scores.max())
    ids = torch.flatten(scores[0] > greatest - 6.0).nonzero()[:, 0]
    assert 40 < len(ids) < 1000
    for position in range(40):
        streams = torch.tensor([stream_of(6, position)])
        for choice in ((1.0, 20, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 1.0, 0.05), (1.0, 20, 0.8, 0.05)):
            totals = masses(scores[0], greatest, 1.0).sum()[None] if choice[1] == 0 else None
            passing = run(scores[:, ids], rows_of([choice]), streams, ids=ids, totals=totals)[0]
            assert passing.tolist() == run(scores, rows_of([choice]), streams)[0].tolist()


def test_masses_are_whole_numbers_of_what_softmax_says(library: Library) -> None:
    gaps = torch.linspace(0.0, -40.0, 2011)
    for temperature in (0.3, 1.0, 2.5, 1e-300):
        expected = np.exp(gaps.double().numpy() / temperature) * 2.0**MASS_BITS
        for found in (library.masses(gaps, 0.0, temperature), masses(gaps, 0.0, temperature)):
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=0.51)
    assert library.masses(torch.tensor([-math.inf, 3.0]), 3.0, 1.0).tolist() == [0, 1 << MASS_BITS]


@pytest.mark.usefixtures("one_thread")
def test_a_row_is_the_same_in_any_batch(library: Library) -> None:
    generator = random.Random(9)
    scores = 3 * torch.randn(64, 431, generator=torch.Generator().manual_seed(4))
    options = rows_of([(generator.choice([0.0, 1.0]), generator.choice([0, 9]), 0.9, 0.0) for _ in range(64)])
    streams = torch.arange(64)
    alone = [
        library.sample(scores[r : r + 1], options[r : r + 1], streams[r : r + 1], 0, None, None) for r in range(64)
    ]
    for threads in (1, 3):
        torch.set_num_threads(threads)
        token_ids, keys = library.sample(scores, options, streams, 0, None, None)
        assert token_ids.tolist() == [int(ids) for ids, _ in alone]
        assert keys.tolist() == [float(key) for _, key in alone]


@pytest.mark.usefixtures("guarded", "one_thread")
def test_writes_all_of_its_outputs_and_nothing_beside_them(library: Library) -> None:
    scores = torch.randn(7, 123, generator=torch.Generator().manual_seed(5))
    token_ids, _ = library.sample(scores, rows_of([(1.0, 5, 0.9, 0.01)] * 7), torch.arange(7), 0, None, None)
    assert ((token_ids >= 0) & (token_ids < 123)).all()
    assert (library.masses(scores[0], 9.0, 1.0) >= 0).all()


@pytest.mark.parametrize("served", [True, False])
def test_the_launcher_serves_with_and_without_the_library(monkeypatch: pytest.MonkeyPatch, served: bool) -> None:
    if not served:
        monkeypatch.setattr(library_module, "shared_library", lambda: None)
    scores = torch.randn(3, 124, generator=torch.Generator().manual_seed(6))[:, 1:]  # not contiguous
    options, streams = rows_of([OFF, (0.7, 9, 0.9, 0.0), (0.0, 0, 1.0, 0.0)]), torch.arange(3)
    expected = reference(scores, options, streams)
    found = sample(scores, options, streams)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=0.0)
    assert sample(scores[:0], options[:0], streams[:0])[0].shape == (0,)
