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
    ("name", "layout", "num_kinds"),
    [
        ("llama3", ParallelLayout(pp=2), 1),
        ("llama3", ParallelLayout(pp=2, dp=2, mlp="stage"), 1),
        ("gemma2", ParallelLayout(tp=2, pp=2), 2),
        ("mixtral", ParallelLayout(pp=2), 1),
        ("deepseek-v3", ParallelLayout(tp=2, pp=2), 2),
        ("gpt-oss", ParallelLayout(pp=2), 2),
    ],
)
def test_every_kind_of_layer_is_timed(tmp_path: Path, name: str, layout: ParallelLayout, num_kinds: int) -> None:
    files = open_model(make_model(tmp_path / "model", name))
    costs = measure_layer_costs(files, EngineOptions(device="cpu", threads=1, block_tokens=5), layout)
    assert len(costs.layers) == files.spec.num_layers
    assert len(set(costs.layers)) == num_kinds
    assert min(*costs.layers, costs.head) > 0
    shards = [
        shard_of(files.spec, layout, rank, layer_costs=costs.layers, head_cost=costs.head)
        for rank in (0, layout.stage_ranks)
    ]
    assert shards[0].layers.stop == shards[1].layers.start
