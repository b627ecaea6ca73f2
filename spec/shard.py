"""What one rank of a layout holds of a model: the sharding, as pure data. engine/sharding.py cuts tensors by it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from spec.dtype import Dtype
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout, ParallelLayout
from spec.model import ModelSpec

Replicas = Mapping[int, Mapping[int, int]]  # layer -> expert -> parts that hold it, where more than one


@dataclasses.dataclass(frozen=True, slots=True)
class RankShard:
    """Ranges are half-open and of indices in the whole model. `stage_rank` is group · tp + index, the rank's number
    within its stage.

    `vocab` is the run whose logits the rank has of its group's rows, `held_vocab` the one that it holds of embedding
    and head: the same but where the stage's groups share the vocabulary. Those of one index have together the run of
    the index."""

    layout: ParallelLayout
    rank: int
    stage: int
    group: int  # among dp
    index: int  # among tp
    layers: range
    heads: range
    kv_heads: range
    intermediate: range
    vocab: range
    held_vocab: range
    experts: tuple[tuple[int, ...], ...]  # of each of its layers the resident ones, in the order of packing
    expert_intermediate: range

    @property
    def stage_rank(self) -> int:
        return self.group * self.layout.tp + self.index

    @property
    def dense_part(self) -> int:
        """Which of layout.dense_tp parts of MLPs and vocabulary the rank holds."""
        return self.layout.dense_part(self.group, self.index)

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pp - 1

    def kv_layout(self, spec: ModelSpec, block_tokens: int, dtype: Dtype) -> KVLayout:
        whole = spec.kv_layout(block_tokens, dtype)
        return dataclasses.replace(whole, num_layers=len(self.layers), num_kv_heads=len(self.kv_heads))


def split(total: int, parts: int, part: int, multiple: int = 1) -> range:
    """The part-th of `parts` runs of [0, total) that differ by at most one `multiple`; bounds are multiples of it."""
    units = -(-total // multiple)
    return range(min(units * part // parts * multiple, total), min(units * (part + 1) // parts * multiple, total))


def shard_of(
    spec: ModelSpec,
    layout: ParallelLayout,
    rank: int,
    *,
    layer_costs: tuple[float, ...] | None = None,
    head_cost: float | None = None,
    replicas: Replicas | None = None,
) -> RankShard:
    """`layer_costs` and `head_cost` (of embedding and head together, in the same unit) balance the stages; where
    they are None, by the parameters that a decoded token reads. Raises InvalidConfiguration when the model cannot be
    laid out so."""
    check_layout(spec, layout)
    assert 0 <= rank < layout.num_ranks
    index, group, stage = rank % layout.tp, rank // layout.tp % layout.dp, rank // layout.stage_ranks
    heads, kv_heads = heads_of(spec, layout.tp, index)
    stage_rank = rank % layout.stage_ranks
    expert_index = stage_rank % layout.expert_tp
    layers = stage_layers(spec, layout.pp, layer_costs, head_cost)[stage]
    moe = spec.moe
    dense_tp, dense_part = layout.dense_tp, layout.dense_part(group, index)
    return RankShard(
        layout=layout,
        rank=rank,
        stage=stage,
        group=group,
        index=index,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=split(spec.intermediate_size, dense_tp, dense_part, _multiple(spec.intermediate_size, dense_tp)),
        vocab=split(spec.vocab_size, layout.tp, index),
        held_vocab=split(spec.vocab_size, dense_tp, dense_part),
        experts=_experts(spec, layout, layers, stage_rank // layout.expert_tp, replicas or {}),
        expert_intermediate=range(0)
        if moe is None
        else split(
            moe.intermediate_size,
            layout.expert_tp,
            expert_index,
            _multiple(moe.intermediate_size, layout.expert_tp),
        ),
    )


def with_replicas(spec: ModelSpec, shard: RankShard, replicas: Replicas) -> RankShard:
    """The same rank, with the experts that it holds under these replicas."""
    part = shard.stage_rank // shard.layout.expert_tp
    return dataclasses.replace(shard, experts=_experts(spec, shard.layout, shard.layers, part, replicas))


def check_layout(spec: ModelSpec, layout: ParallelLayout) -> None:
    """Raises InvalidConfiguration saying which number does not fit the model."""
    if layout.pp > spec.num_layers:
        raise InvalidConfiguration(f"pp {layout.pp} exceeds the model's {spec.num_layers} layers")
    if layout.tp > spec.num_heads:
        raise InvalidConfiguration(f"tp {layout.tp} exceeds the model's {spec.num_heads} heads")
    if layout.tp > spec.num_kv_heads and layout.tp % spec.num_kv_heads and spec.latent is None:
        raise InvalidConfiguration(
            f"tp {layout.tp} is above the model's {spec.num_kv_heads} KV heads and no multiple of them"
        )
    if layout.mlp == "gathered" and spec.intermediate_size % layout.tp:
        raise InvalidConfiguration(
            f"weight-gathered MLPs need equal parts: tp {layout.tp} does not divide {spec.intermediate_size}"
        )
    if layout.dense_tp > min(spec.intermediate_size, spec.vocab_size):
        raise InvalidConfiguration(
            f"{layout.dense_tp} ranks exceed the MLP's {spec.intermediate_size} columns or {spec.vocab_size} tokens"
        )
    if layout.ep > 1 and spec.moe is None:
        raise InvalidConfiguration(f"ep {layout.ep} is for mixtures of experts; this model has none")
    if spec.moe is not None and layout.ep > spec.moe.num_experts:
        raise InvalidConfiguration(f"ep {layout.ep} exceeds the model's {spec.moe.num_experts} experts")


def heads_of(spec: ModelSpec, tp: int, index: int) -> tuple[range, range]:
    """Query heads and KV heads of rank `index` of a group. Query heads follow their KV head; a KV head that several
    ranks need is held by each of them."""
    if spec.latent is not None:
        return split(spec.num_heads, tp, index), range(1)
    per_kv_head = spec.num_heads // spec.num_kv_heads
    if tp <= spec.num_kv_heads:
        kv_heads = split(spec.num_kv_heads, tp, index)
        return range(kv_heads.start * per_kv_head, kv_heads.stop * per_kv_head), kv_heads
    sharing = tp // spec.num_kv_heads
    kv_head, part = index // sharing, index % sharing
    own = split(per_kv_head, sharing, part)
    return range(kv_head * per_kv_head + own.start, kv_head * per_kv_head + own.stop), range(kv_head, kv_head + 1)


def _multiple(size: int, parts: int) -> int:
    """The largest usual group of quantised weights at which the parts can be cut and stay equal; 1 where none is."""
    return next((multiple for multiple in (128, 64, 32, 16, 8) if size % (multiple * parts) == 0), 1)


def _experts(
    spec: ModelSpec, layout: ParallelLayout, layers: range, part: int, replicas: Replicas
) -> tuple[tuple[int, ...], ...]:
    if spec.moe is None:
        return ((),) * len(layers)
    num_experts = spec.moe.num_experts
    return tuple(place_experts(num_experts, layout.ep, replicas.get(layer))[part] for layer in layers)


def place_experts(num_experts: int, parts: int, replicas: Mapping[int, int] | None = None) -> list[tuple[int, ...]]:
    """Experts of each part: runs of equal length, and copies of each replicated one in the parts that hold fewest."""
    placed = [list(split(num_experts, parts, part)) for part in range(parts)]
    for expert, copies in sorted((replicas or {}).items(), key=lambda item: (-item[1], item[0])):
        for _ in range(copies - 1):
            without = [part for part in range(parts) if expert not in placed[part]]
            if not without:
                break
            placed[min(without, key=lambda part: (len(placed[part]), part))].append(expert)
    return [tuple(experts) for experts in placed]


def replicas_for(loads: Sequence[Sequence[int]], parts: int, copies: int) -> Replicas:
    """Which experts to hold more than once, from `loads[layer][expert]`, how often each was chosen: `copies` more of
    each layer's experts, one by one to the expert with the most load per copy (DeepSeek's EPLB, arXiv:2412.19437,
    section 3.4). An expert is never held twice in one part."""
    found: dict[int, dict[int, int]] = {}
    for layer, load in enumerate(loads):
        held = [1] * len(load)
        for _ in range(copies):
            open_experts = [expert for expert in range(len(load)) if held[expert] < parts and load[expert]]
            if not open_experts:
                break
            held[max(open_experts, key=lambda expert: (load[expert] / held[expert], -expert))] += 1
        if more := {expert: count for expert, count in enumerate(held) if count > 1}:
            found[layer] = more
    return found


def imbalance(loads: Sequence[Sequence[int]], parts: int, replicas: Replicas) -> float:
    """What the busiest part computes by what a part computes on average: the mean over layers with load, 1.0 without.
    The copies of an expert share its load."""
    found = []
    for layer, load in enumerate(loads):
        if not sum(load):
            continue
        placed = place_experts(len(load), parts, replicas.get(layer))
        copies = [sum(expert in experts for experts in placed) for expert in range(len(load))]
        busiest = max(sum(load[expert] / copies[expert] for expert in experts) for experts in placed)
        found.append(busiest * parts / sum(load))
    return sum(found) / len(found) if found else 1.0


def stage_layers(
    spec: ModelSpec, pp: int, layer_costs: tuple[float, ...] | None = None, head_cost: float | None = None
) -> list[range]:
    """Runs of layers that make the costliest stage as cheap as can be; the last stage bears the head beside its layers.

    Linear partition by dynamic programming; every stage has a layer at least."""
    num_layers = spec.num_layers
    if layer_costs is None:
        mlp = [spec.mlp_parameters(layer, active=True) for layer in range(num_layers)]
        layer_costs = tuple(float(spec.attention_parameters + cost) for cost in mlp)
        head_cost = float(spec.vocab_size * spec.hidden_size)
    assert len(layer_costs) == num_layers
    until = [0.0]
    for cost in layer_costs:
        until.append(until[-1] + cost)

    def cost_of(start: int, end: int) -> float:
        return until[end] - until[start] + ((head_cost or 0.0) if end == num_layers else 0.0)

    # best[end]: (cost of the costliest stage, bounds) of the stages so far over layers [0, end)
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        end: (cost_of(0, end), (0, end)) for end in range(1, num_layers + 1)
    }
    for stage in range(2, pp + 1):
        following = {}
        for end in range(stage, num_layers + 1):
            choices = (
                (max(best[start][0], cost_of(start, end)), (*best[start][1], end)) for start in best if start < end
            )
            following[end] = min(choices)
        best = following
    bounds = best[num_layers][1]
    return [range(start, end) for start, end in itertools.pairwise(bounds)]
