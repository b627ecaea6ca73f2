"""Layers recorded as one native call give bit for bit what the kernels give one by one."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from stepper import Stepper, rows_of
from tiny_models import MODELS, MOE_MODELS, make_model

from engine.engine import Engine, EngineOptions
from engine.layer_hook import LayerHook
from engine.model_files import open_model
from kernels.cpu.library import shared_library

DENSE = [name for name in MODELS if name not in MOE_MODELS]
needs_kernels = pytest.mark.skipif(shared_library() is None, reason="no C++ compiler: there is nothing to record")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param), request.param)


def rows(engine: Engine) -> np.ndarray:
    """Chunks and single tokens of five sequences in steps that mix them, some of which ask for a few rows alone."""
    generator, stepper = random.Random(2), Stepper(engine)
    running = []
    for i in range(5):
        token_ids = [generator.randrange(engine.spec.vocab_size) for _ in range(17 + 9 * i)]
        running.append(stepper.add(f"s{i}", token_ids, 11 + 8 * i))
    while pending := [each for each in running if each.computed < len(each.token_ids)]:
        taken = generator.sample(pending, generator.randrange(1, len(pending) + 1))
        stepper.step([(each, max(1, min(13, each.num_prompt - each.computed))) for each in taken])
    return np.concatenate([rows_of(each) for each in running])


def compare(folder: Path, **options: str) -> None:
    files = open_model(folder)
    recorded = Engine(files, EngineOptions(device="cpu", block_tokens=7, **options), 60)
    assert recorded.decoder.recorded is not None
    one_by_one = Engine(files, EngineOptions(device="cpu", block_tokens=7, **options), 60)
    one_by_one.decoder.recorded = None
    assert np.array_equal(rows(recorded), rows(one_by_one))


@needs_kernels
@pytest.mark.parametrize("folder", ["llama3"], indirect=True)
def test_a_run_with_pauses_gives_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = open_model(folder)
    whole, paused = (Engine(files, EngineOptions(device="cpu", block_tokens=7), 60) for _ in range(2))
    ends: list[int] = []
    for engine in (whole, paused):
        engine.kv.tensor.zero_()
    monkeypatch.setattr(
        paused, "execute", functools.partial(paused.execute, hook=LayerHook((1, files.spec.num_layers), ends.append))
    )
    assert np.array_equal(rows(paused), rows(whole))
    assert torch.equal(paused.kv.tensor, whole.kv.tensor)
    assert set(ends) == {1, files.spec.num_layers}


@needs_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("folder", DENSE, indirect=True)
def test_every_dense_family(folder: Path, dtype: str) -> None:
    compare(folder, dtype=dtype)


@needs_kernels
@pytest.mark.parametrize("folder", ["gemma3"], indirect=True)
@pytest.mark.parametrize("options", [{"kv_dtype": "int8"}, {"kv_dtype": "float8_e4m3"}, {"kv_dtype": "float32"}])
def test_every_form_of_kv(folder: Path, options: dict[str, str]) -> None:
    compare(folder, dtype="bfloat16", **options)


@needs_kernels
@pytest.mark.parametrize("folder", ["llama3"], indirect=True)
@pytest.mark.parametrize("quantisation", ["int8", "int4", "fp8"])
def test_every_form_of_weights(folder: Path, quantisation: str) -> None:
    compare(folder, dtype="bfloat16", quantisation=quantisation)


@pytest.mark.parametrize("folder", ["llama3"], indirect=True)
def test_kv_that_no_kernel_was_compiled_for_runs_one_by_one(folder: Path) -> None:
    engine = Engine(open_model(folder), EngineOptions(device="cpu", dtype="float32", kv_dtype="float16"), 60)
    assert engine.decoder.recorded is None
    rows(engine)


@pytest.mark.parametrize("folder", ["mixtral", "deepseek-v2-lite"], indirect=True)
def test_what_is_not_covered_runs_one_by_one(folder: Path) -> None:
    engine = Engine(open_model(folder), EngineOptions(device="cpu"), 60)
    assert engine.decoder.recorded is None
    rows(engine)
