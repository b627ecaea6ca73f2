"""The script for a GPU, as far as a CPU takes it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from bench.gpu import (
    LLAMA_1B,
    LLAMA_8B,
    DrawnWeights,
    Report,
    check_kernels,
    decode_step_s,
    prefill_flop,
    prefill_s,
    weight_bytes_read,
)
from engine.engine import Engine, EngineOptions
from spec.hf_config import model_from_hf

TINY = LLAMA_1B | {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "head_dim": 6,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "bench.gpu"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "needs an NVIDIA GPU" in done.stderr


def test_shapes_are_those_of_the_models() -> None:
    """Parameters by the models' cards: 1.24 and 8.03 billion, norms included."""
    assert model_from_hf(LLAMA_1B).num_parameters == pytest.approx(1.2358e9, rel=1e-3)
    assert model_from_hf(LLAMA_8B).num_parameters == pytest.approx(8.0303e9, rel=1e-3)
    assert weight_bytes_read(model_from_hf(LLAMA_1B)) == pytest.approx(2 * 1.2358e9, rel=1e-3)
    assert weight_bytes_read(model_from_hf(LLAMA_8B)) == pytest.approx(2 * (8.0303e9 - 128256 * 4096), rel=1e-3)


def test_work_of_a_prefill() -> None:
    """Of one layer of a model so small that it is counted by hand, 10 tokens."""
    spec = model_from_hf(TINY | {"num_hidden_layers": 1})
    per_token = 48 * 48 + 48 * 96 + 48 * 48 + 3 * 48 * 80
    assert prefill_flop(spec, 10) == 2 * (10 * per_token + 131 * 48) + 4 * 8 * 6 * 10 * 10 / 2


def test_drawn_weights_make_an_engine_that_decodes() -> None:
    files = DrawnWeights(model_from_hf(TINY), torch.device("cpu"))
    files.check()
    engine = Engine(files, EngineOptions(dtype="bfloat16", device="cpu"), 8)
    engine.kv.tensor.normal_()
    assert prefill_s(engine, 40, 1) > 0
    assert decode_step_s(engine, 2, 20, 4) > 0
    with pytest.raises(MemoryError, match="9 sequences"):
        decode_step_s(engine, 9, 20, 4)


def test_checks_of_kernels_pass_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report()
    check_kernels(report, torch.device("cpu"))
    assert [line.error for line in report.lines] == [""] * 7
    monkeypatch.setattr("kernels.rms_norm.reference", lambda x, *_: (x, x))
    report = Report()
    check_kernels(report, torch.device("cpu"))
    assert [line.what for line in report.lines if line.error.startswith("ArithmeticError")] == ["kernel rms_norm"]


def test_a_part_that_fails_is_named() -> None:
    report = Report()

    def part() -> None:
        raise RuntimeError("out of memory\nand more")

    report.attempt("prefill", part)
    report.add("decode", 3.0, "steps/s")
    assert [(line.what, line.error) for line in report.lines] == [
        ("prefill", "RuntimeError: out of memory"),
        ("decode", ""),
    ]
