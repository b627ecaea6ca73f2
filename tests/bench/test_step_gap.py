"""What bench.step_gap counts: every decode step of both ways, and no other."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from tiny_llama import Shape, make_llama

from bench.step_gap import WAYS, run
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model


@pytest.mark.parametrize("way", WAYS)
def test_a_gap_before_every_step_of_decodes(tmp_path: Path, way: str) -> None:
    files = open_model(make_llama(tmp_path / "model", Shape("tiny")))
    engine = Engine(files, EngineOptions(device="cpu", threads=1), 40)
    logits = engine.decoder.logits
    gaps = run(engine, 3, way, argparse.Namespace(context_tokens=17, steps=6, seed=0), 0)
    assert len(gaps.seconds) == len(gaps.step_s) == 5
    assert min(gaps.seconds + gaps.step_s) > 0.0
    assert engine.decoder.logits == logits
