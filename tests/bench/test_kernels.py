"""The script that measures kernels on a GPU, as far as the Triton interpreter takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.device import Limits
from bench.kernel_case import Case, Goal, Peer, Setting, Work, relative_difference
from bench.kernels import all_cases, measure_all, measure_case

ROOT = Path(__file__).resolve().parents[2]
SETTING = Setting(torch.device("cpu"), torch.float16, interpreted=True)
LIMITS = Limits(1e9, 1e12, None, 2e9, 3e12)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.kernels"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs an NVIDIA GPU" in done.stderr


def test_a_dry_run_takes_every_kernel_to_its_end(tmp_path: Path) -> None:
    """Each agrees with its reference, and so does each peer that a CPU has."""
    pytest.importorskip("triton", reason="no Triton on this platform")
    results = tmp_path / "kernels.jsonl"
    options = ("--dry-run", "--rounds", "1", "--results", str(results))
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels", *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = map(json.loads, results.read_text().splitlines())
    ours = {line["what"]: line for line in record["results"] if not line["peer"]}
    assert list(ours) == [case.name for case in all_cases()]
    assert all(line["median_s"] > 0 and line["difference"] <= 0.05 for line in ours.values())
    assert record["limits"]["product_flop_per_s"] > 0
    peers = {line["peer"] for line in record["results"] if line["peer"] and not line["error"]}
    assert {"SDPA flash", "F.grouped_mm", "F.rms_norm", "F.silu · up", "torch._scaled_mm of fp8 rows"} <= peers
    assert {"argmax", "softmax, topk", "bmm, softmax, bmm", "copy_ of as much"} <= peers
    assert not [line for line in record["results"] if "something else" in line["error"]]
    if not torch.cuda.is_available():
        assert "did not run: prefill attention, 8192 causal: SDPA cuDNN" in done.stdout


def test_every_kernel_has_a_case() -> None:
    """A kernel that is new needs an entry in the CASES of a bench/kernel_*.py."""
    launched = {path.stem for path in (ROOT / "kernels").glob("*.py") if "\ndef launch(" in path.read_text()}
    assert launched == {case.module for case in all_cases() if case.module is not None}


def case_of(
    kernel: Tensor,
    peers: dict[str, Peer],
    goal: Goal | None = None,
    peer_goals: dict[str, float] | None = None,
    num_bytes: float = 1.0,
) -> Case:
    """One that must compute 1, 2, 3."""

    def make(setting: Setting) -> Work:
        return Work(lambda: kernel, lambda: torch.tensor([1.0, 2.0, 3.0]), peers, num_bytes)

    return Case("a case", None, make, {}, {}, {}, goal=goal, peer_goals=peer_goals or {})


def test_a_kernel_that_is_wrong_is_not_timed() -> None:
    for wrong in (torch.tensor([1.0, 2.0, 3.1]), torch.tensor([1.0, torch.nan, 3.0])):
        (line,) = measure_case(case_of(wrong, {}), SETTING, LIMITS, 1)
        assert line.error.startswith("ArithmeticError: it is ")
        assert line.median_s is None


def test_peers_that_are_wrong_or_missing_are_lines_and_the_kernel_is_timed() -> None:
    right = torch.tensor([1.0, 2.0, 3.01])

    def missing() -> None:
        import no_such_package_as_this  # noqa: F401

    peers = {
        "right": Peer(lambda: lambda: right),
        "wrong": Peer(lambda: lambda: right + 1),
        "by chance": Peer(lambda: lambda: right + 1, None),
        "missing": Peer(missing),  # type: ignore[arg-type]
    }
    lines = measure_case(case_of(right, peers), SETTING, LIMITS, 3)
    assert [(line.peer, line.error.split(":")[0]) for line in lines] == [
        ("", ""),
        ("right", ""),
        ("by chance", ""),
        ("wrong", "ArithmeticError"),
        ("missing", "ModuleNotFoundError"),
    ]
    assert lines[0].difference == pytest.approx(0.01 / 3, rel=1e-3)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal("rate", 1e-3), "yes"),
        (Goal("rate", 1e30), "no"),
        (Goal("share", 1e-12, 1e-11), "stretch"),
        (None, ""),
    ],
)
def test_goals_are_judged(goal: Goal | None, met: str) -> None:
    right = torch.tensor([1.0, 2.0, 3.0])
    peers = {name: Peer(lambda: lambda: right) for name in ("slow", "fast", "other")}
    case = case_of(right, peers, goal, {"slow": 0.0, "fast": 1e9})  # whatever the clock says
    line, slow, fast, other = measure_case(case, SETTING, LIMITS, 5)
    assert line.met == met
    assert line.share == pytest.approx(line.rate / 1e9)
    assert (slow.met, fast.met, other.met) == ("yes", "no", "")
    assert slow.ratio == pytest.approx(slow.median_s / line.median_s)


def test_a_share_of_the_sheet_is_not_one_of_the_copy() -> None:
    from bench.kernel_report import kernel_line

    right = torch.tensor([1.0])
    for least, met in ((0.24, "yes"), (0.26, "no")):  # half of the copy's 1 GB/s is a quarter of the sheet's 2 GB/s
        case = case_of(right, {}, Goal("sheet", least), num_bytes=5e8)
        line = kernel_line(case, case.make(SETTING), LIMITS, 0.0, [1.0], False)
        assert (line.share, line.met) == (0.5, met)


def test_no_case_begins_after_the_limit() -> None:
    cases = (case_of(torch.tensor([1.0, 2.0, 3.0]), {}),) * 2
    lines = list(measure_all(cases, SETTING, LIMITS, 1, limit_s=-1.0))
    assert [line.error for line in lines] == ["not begun: -1 s had passed"] * 2


def test_a_difference_is_relative_to_the_greatest_number() -> None:
    assert relative_difference(torch.tensor([1.0, -4.5]), torch.tensor([1.0, -4.0])) == 0.125
    ones = torch.ones(2)
    assert relative_difference((ones, ones * 3), (ones, ones * 2)) == 0.5
    with pytest.raises(AssertionError):
        relative_difference(torch.ones(2), torch.ones(1))
