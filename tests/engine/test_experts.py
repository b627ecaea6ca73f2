"""What a rank counts of its experts."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import make_model

from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from scheduler.plan import Slice, StepPlan


def test_every_choice_of_a_token_is_counted(tmp_path: Path) -> None:
    files = open_model(make_model(tmp_path, "mixtral"))
    engine = Engine(files, EngineOptions(dtype="float32", device="cpu"), 4)
    for tokens in (tuple(range(5, 28)), (3,)):
        engine.execute(StepPlan(0, (Slice("a", tokens, 0, (0, 1), None),)))
    assert engine.decoder.experts is not None and files.spec.moe is not None
    loads = engine.decoder.experts.loads[:-1]  # nobody asked for a row of the last layer
    per_layer = loads.sum(dim=1)
    assert torch.equal(per_layer, torch.full_like(per_layer, 24 * files.spec.moe.experts_per_token))
    assert (loads > 0).sum(dim=1).min() > 1
