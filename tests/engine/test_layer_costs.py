"""Costs are of this machine: what is held here is that every kind of layer is timed, and that stages follow them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_model

from engine.engine import EngineOptions
from engine.layer_costs import measure_layer_costs
from engine.model_files import open_model
from spec.layout import ParallelLayout
from spec.shard import shard_of


@pytest.mark.parametrize(
    ("name", "tp", "num_kinds"),
    [("llama3", 1, 1), ("gemma2", 2, 2), ("mixtral", 1, 1), ("deepseek-v3", 2, 2), ("gpt-oss", 1, 2)],
)
def test_every_kind_of_layer_is_timed(tmp_path: Path, name: str, tp: int, num_kinds: int) -> None:
    files = open_model(make_model(tmp_path / "model", name))
    costs = measure_layer_costs(files, EngineOptions(device="cpu", threads=1, block_tokens=5), tp)
    assert len(costs.layers) == files.spec.num_layers
    assert len(set(costs.layers)) == num_kinds
    assert min(*costs.layers, costs.head) > 0
    shards = [
        shard_of(files.spec, ParallelLayout(tp=tp, pp=2), rank, layer_costs=costs.layers, head_cost=costs.head)
        for rank in (0, tp)
    ]
    assert shards[0].layers.stop == shards[1].layers.start
