"""What a turn is worth: its figure, and whether the machine held still."""

from __future__ import annotations

import dataclasses
import os

import pytest

from bench import peers
from bench.turns import Round, Turn, Workload, disturbances, usual_bandwidth

DECODE = Workload("decode", 1, 5, 4)
QUIET = Turn(1.0, [5], (30e9, 31e9), 0.05, 0.01)


def test_figures() -> None:
    assert DECODE.seconds([1.0, 1.2, 1.5, 1.6]) == pytest.approx(0.2)
    assert Workload("prefill", 1, 5, 1).seconds([0.7]) == 0.7


def test_a_quiet_round_has_nothing_against_it() -> None:
    assert disturbances(Round(DECODE, {"ours": QUIET, "peer": QUIET}), 30e9, 2) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bandwidths": (30e9, 25e9)}, "memory was read at 83%"),
        ({"bandwidths": (35e9, 30e9)}, "memory was read at 117%"),
        ({"others_cores": 0.3}, "others used 0.3 cores"),
        ({"idle_sides_cores": 0.2}, "idle sides used 0.2 cores"),
    ],
)
def test_each_disturbance_is_found(change: dict[str, object], word: str) -> None:
    threads = os.cpu_count() or 1
    found = disturbances(Round(DECODE, {"ours": QUIET, "peer": dataclasses.replace(QUIET, **change)}), 30e9, threads)
    assert len(found) == 1
    assert word in found[0]
    assert "peer" in found[0]


def test_others_may_have_the_cores_that_nobody_needs() -> None:
    busy = dataclasses.replace(QUIET, others_cores=(os.cpu_count() or 1) - 0.9)
    assert disturbances(Round(DECODE, {"ours": busy}), 30e9, 0) == []
    assert disturbances(Round(DECODE, {"ours": busy}), 30e9, 1) == []
    assert disturbances(Round(DECODE, {"ours": busy}), 30e9, 2)


def test_the_usual_bandwidth_is_the_median_of_all_probes() -> None:
    other = dataclasses.replace(QUIET, bandwidths=(10e9, 32e9))
    assert usual_bandwidth([Round(DECODE, {"ours": QUIET, "peer": other})]) == 30.5e9


def _round(ours: Turn, peer: Turn) -> Round:
    return Round(DECODE, {"ours": ours, "peer": peer})


def test_only_steady_rounds_count_and_ratios_are_of_one_round() -> None:
    slow = dataclasses.replace(QUIET, seconds=3.0)
    slower = dataclasses.replace(QUIET, seconds=6.0)
    rounds = [(_round(QUIET, slow), True), (_round(slow, slower), True), (_round(QUIET, slower), False)]
    found = peers.figures(rounds)
    assert (found["rounds"], found["steady"]) == (3, 2)
    peer = found["sides"]["peer"]
    assert (peer["ratio"], peer["ratio_min"], peer["ratio_max"]) == (2.5, 2.0, 3.0)
    assert peer["all_s"] == [3.0, 6.0, 6.0]
    assert found["sides"]["ours"]["median_s"] == 2.0


def test_without_a_steady_round_all_are_shown() -> None:
    found = peers.figures([(_round(QUIET, QUIET), False)])
    assert (found["rounds"], found["steady"], found["sides"]["peer"]["ratio"]) == (1, 0, 1.0)


def test_ratios_are_to_ours_of_the_same_weights() -> None:
    names = ["ours", "llama.cpp BF16", "llama.cpp Q8_0", "ours Q8_0"]
    assert [peers.base_of(name, names) for name in names] == ["ours", "ours", "ours Q8_0", "ours Q8_0"]


def test_first_tokens_are_compared_prompt_by_prompt() -> None:
    ours = dataclasses.replace(QUIET, first_token_ids=[1, 2, 3])
    peer = dataclasses.replace(QUIET, first_token_ids=[1, 3, 3])
    assert peers.first_token_agreement([_round(ours, peer), _round(ours, ours)]) == {"peer": (5, 6)}
