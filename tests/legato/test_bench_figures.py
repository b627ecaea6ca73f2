"""Arrivals, lengths, percentiles and figures against NumPy and against sums done by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from legato.bench import arrivals, quantiles
from legato.bench.lengths import parse_lengths
from legato.bench.plot import binned, nice_width_s
from legato.bench.record import Record
from legato.bench.report import in_flight, latencies_ms, meets
from legato.bench.settings import Settings, Slo, plan
from legato.errors import InvalidParameter, Overloaded


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 4321])
def test_percentiles_are_those_of_numpy(count):
    samples = list(np.random.default_rng(count).lognormal(3, 2, count))
    one = quantiles.summary(samples)
    assert one.count == count
    found = (one.mean, one.p50, one.p90, one.p99, one.max)
    expected = (np.mean(samples), *np.quantile(samples, [0.5, 0.9, 0.99]), max(samples))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_no_sample_has_no_percentile():
    assert quantiles.summary([]) is None


def kolmogorov_distance(samples: np.ndarray, others: np.ndarray) -> float:
    both = np.sort(np.concatenate([samples, others]))
    shares = [np.searchsorted(np.sort(one), both, side="right") / len(one) for one in (samples, others)]
    return float(np.abs(shares[0] - shares[1]).max())


def critical(count: int) -> float:
    """Of two samples of that size: one pair of equal distributions in ten thousand is further apart."""
    return 2.23 * np.sqrt(2 / count)


@pytest.mark.parametrize("rate", [0.3, 7.0, 2500.0])
def test_gaps_of_the_open_loop_are_exponential(rate):
    count = 20_000
    times_s = np.array(list(itertools.islice(arrivals.poisson_times_s(rate, 3), count)))
    gaps_s = np.diff(times_s, prepend=0.0)
    expected = np.random.default_rng(1).exponential(1 / rate, count)
    assert kolmogorov_distance(gaps_s, expected) < critical(count)
    assert kolmogorov_distance(np.full(count, 1 / rate), expected) > 10 * critical(count), "the test tells them apart"
    per_second = np.histogram(times_s * rate, bins=np.arange(0, count * 0.9))[0]
    assert per_second.var() == pytest.approx(per_second.mean(), rel=0.05), "counts of a Poisson process"
    assert np.corrcoef(gaps_s[:-1], gaps_s[1:])[0, 1] == pytest.approx(0, abs=0.03), "gaps know nothing of each other"


@pytest.mark.parametrize(
    ("written", "draw"),
    [
        ("37", lambda drawn, count: np.full(count, 37)),
        ("32-256", lambda drawn, count: drawn.integers(32, 257, count)),
        ("normal:128,32", lambda drawn, count: np.maximum(1, np.rint(drawn.normal(128, 32, count)))),
        ("normal:3,9", lambda drawn, count: np.maximum(1, np.rint(drawn.normal(3, 9, count)))),
        ("lognormal:100,0.6", lambda drawn, count: np.maximum(1, np.rint(drawn.lognormal(np.log(100), 0.6, count)))),
    ],
)
def test_lengths_are_distributed_as_written(written, draw):
    count = 20_000
    lengths, uniform = parse_lengths(written, "--prompt-tokens"), random.Random(2)
    found = np.array([lengths.draw(uniform) for _ in range(count)])
    assert found.min() >= 1
    assert kolmogorov_distance(found, draw(np.random.default_rng(2), count)) < critical(count)


@pytest.mark.parametrize(
    "written", ["", "0", "-5", "9-3", "0-4", "many", "normal:3", "normal:0,1", "uniform:1,2", "1.5"]
)
def test_lengths_that_mean_nothing_are_named(written):
    with pytest.raises(InvalidParameter, match="--output-tokens"):
        parse_lengths(written, "--output-tokens")


def test_a_seed_gives_the_same_load_and_another_gives_another():
    settings = [Settings(rate=5.0, prompt_tokens=parse_lengths("10-90", ""), seed=seed) for seed in (1, 1, 2)]
    first, again, other = (list(plan(one, 4096).arrivals) for one in settings)
    assert first == again != other
    assert len(first) == 64
    faster = list(plan(Settings(rate=50.0, prompt_tokens=parse_lengths("10-90", ""), seed=1), 4096).arrivals)
    assert [one.prompt_tokens for one in faster] == [one.prompt_tokens for one in first]


def test_requests_and_duration_both_end_a_load():
    due = list(plan(Settings(rate=100.0, duration_s=2.0), 4096).arrivals)
    assert 150 < len(due) < 250
    assert max(one.at_s for one in due) < 2.0
    assert len(list(plan(Settings(rate=100.0, duration_s=2.0, requests=7), 4096).arrivals)) == 7
    with pytest.raises(InvalidParameter, match="before the first request"):
        plan(Settings(rate=0.001, duration_s=0.1), 4096)


def record(due_s, pieces, ended_s, sent_s=None, error=None):
    return Record(0, due_s, due_s if sent_s is None else sent_s, 9, pieces=pieces, ended_s=ended_s, error=error)


def test_times_of_one_request():
    one = record(10.0, [(10.5, 1), (10.6, 1), (10.9, 3), (11.0, 1)], 11.2, sent_s=10.1)
    assert one.ttft_s == pytest.approx(0.5), "from when it was due, not from when it was sent"
    assert one.itls_s == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1])
    assert one.tpot_s == pytest.approx(0.5 / 5)
    assert one.end_to_end_s == pytest.approx(1.2)
    assert one.output_tokens == 6
    figures = latencies_ms([one])
    assert figures["longest_gap"].max == pytest.approx(300), "what ITL evens out"
    assert figures["itl"].count == 5


def test_tokens_that_came_with_the_first_have_no_time_of_their_own():
    assert record(0.0, [(1.0, 3), (1.4, 2)], 2.0).tpot_s == pytest.approx(0.2)
    single = record(0.0, [(1.0, 4)], 1.0)
    assert single.tpot_s is None
    assert single.itls_s == []
    nothing = record(0.0, [], 1.0)
    assert (nothing.ttft_s, nothing.tpot_s) == (None, None)


def test_itl_is_weighted_by_tokens():
    """The mean over tokens is the time over tokens, however they were bunched."""
    draw = random.Random(4)
    ends_s = sorted(draw.uniform(0, 9) for _ in range(50))
    pieces = [(end_s, draw.randint(1, 6)) for end_s in ends_s]
    one = record(0.0, pieces, 9.0)
    expected = (ends_s[-1] - ends_s[0]) / sum(tokens for _, tokens in pieces[1:])
    assert np.mean(one.itls_s) == pytest.approx(expected)
    assert one.tpot_s == pytest.approx(expected)


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        (Slo(ttft_ms=500), True),
        (Slo(ttft_ms=499), False),
        (Slo(tpot_ms=110), True),
        (Slo(tpot_ms=90), False),
        (Slo(itl_ms=260), True),
        (Slo(itl_ms=240), False),
        (Slo(e2e_ms=1000), True),
        (Slo(ttft_ms=500, e2e_ms=999), False),
    ],
)
def test_a_request_keeps_every_limit_or_misses(slo, kept):
    pieces = [(0.5, 1), *((0.5 + 0.03 * step, 1) for step in range(1, 3)), (0.81, 1), (0.9, 1)]
    assert meets(record(0.0, pieces, 1.0), slo) is kept


def test_what_failed_or_did_not_end_keeps_no_slo():
    assert not meets(record(0.0, [(0.1, 1)], 0.2, error=Overloaded("full")), Slo(ttft_ms=1000))
    assert not meets(record(0.0, [(0.1, 1)], None), Slo(ttft_ms=1000))
    assert meets(record(0.0, [(0.1, 1)], 0.2), Slo(ttft_ms=1000, itl_ms=1, tpot_ms=1)), "one token has no ITL"


def test_requests_in_flight():
    records = [record(0.0, [], 2.0), record(1.0, [], None), record(3.0, [], 3.5)]
    assert [in_flight(records, at_s) for at_s in (0.5, 1.5, 2.5, 3.2, 4.0)] == [1, 2, 1, 2, 1]


def test_bins_of_a_timeline():
    for span_s in (0.02, 1, 3.3, 60, 7200):
        width_s = nice_width_s(span_s)
        assert 15 <= span_s / width_s <= 41
    events = [(random.Random(place).uniform(0, 10), place % 5) for place in range(500)]
    expected = np.histogram([at for at, _ in events], bins=np.arange(0, 10.5, 0.5), weights=[n for _, n in events])[0]
    assert binned(events, 0.5, 20) == list(expected)
    assert binned([(99.0, 1)], 0.5, 20)[-1] == 1, "what comes after the last bin is not lost"
