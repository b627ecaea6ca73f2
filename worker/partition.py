"""How the model is cut over the ranks of a worker: pipeline stages are balanced by what layers take here."""

from __future__ import annotations

from engine.engine import EngineOptions
from engine.layer_costs import LayerCosts, measure_layer_costs
from engine.model_base import ModelFiles
from service import logs
from spec.layout import ParallelLayout
from spec.model import ModelSpec
from spec.shard import RankShard, shard_of, stage_layers

logger = logs.get(__name__)


def measured_costs(files: ModelFiles, options: EngineOptions, layout: ParallelLayout) -> LayerCosts:
    """Says, too, how the stages are cut by them. Takes the time and raises as measure_layer_costs() does."""
    costs = measure_layer_costs(files, options, layout)
    stages = stage_layers(files.spec, layout.pp, costs.layers, costs.head)
    logger.info(
        "stages of %s layers; a layer takes %s ms, the head %.2f ms",
        ", ".join(str(len(layers)) for layers in stages),
        " or ".join(f"{cost * 1e3:.2f}" for cost in sorted(set(costs.layers))),
        costs.head * 1e3,
    )
    return costs


def shards_of(spec: ModelSpec, layout: ParallelLayout, costs: LayerCosts | None) -> list[RankShard]:
    """By rank. `costs`: None where there is one stage, which needs no balance. Raises InvalidConfiguration."""
    if costs is None:
        return [shard_of(spec, layout, rank) for rank in range(layout.num_ranks)]
    return [
        shard_of(spec, layout, rank, layer_costs=costs.layers, head_cost=costs.head) for rank in range(layout.num_ranks)
    ]
