"""The tuner, as far as it goes without a GPU: what it may try, and what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")

from kernels import tune, tuning

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("operation", tuning.operations())
def test_the_space_names_the_tiles_of_the_table(operation: str) -> None:
    """And holds what is launched now, so that a row of another's can be what is chosen."""
    space = tune.space(operation)
    for architecture in tuning.SHARED_BYTES:
        for row in tuning.table(operation, architecture).rows:
            assert row.config in space


def test_results_off_the_reference_are_told() -> None:
    expected = torch.randn(123, 7)
    assert tune.is_right([expected + 0.01 * torch.randn(123, 7)], [expected])
    assert not tune.is_right([expected + 0.03 * torch.randn(123, 7)], [expected])
    assert not tune.is_right([torch.full((123, 7), float("nan"))], [expected])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_is_timed() -> None:
    done = subprocess.run([sys.executable, "-m", "kernels.tune", "rms_norm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no GPU" in done.stderr
