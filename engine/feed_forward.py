"""The feed-forward part of a layer on one rank: dense, weight-gathered, or a mixture of experts."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from engine.batch_sharding import GroupRows
from engine.groups import Groups
from engine.projection import Projection, Segments
from engine.weights import MlpWeights, MoeWeights
from kernels.gated_activation import gated_activation
from kernels.linear import linear
from kernels.moe_mlp import moe_mlp
from kernels.moe_route import moe_route
from spec.model import Activation, ModelSpec, MoeSpec
from spec.shard import RankShard, Replicas, place_experts, split


def dense(x: Tensor, weights: MlpWeights, activation: Activation, segments: Segments = ()) -> Tensor:
    """[T, hidden] -> [T, hidden], the rank's partial sums."""
    return weights.down(gated_activation(weights.gate_up(x, segments), activation), segments)


def batch_sharded(x: Tensor, weights: MlpWeights, activation: Activation, rows: GroupRows, groups: Groups) -> Tensor:
    """[T, hidden] -> [T, hidden], partial sums that only the ranks of the group still have to add up. Every rank of the
    stage calls it; see engine/batch_sharding.py. `rows`: those of all groups."""
    if not any(rows.counts):
        return x
    partial = dense(groups.gather_rows(x, rows.counts), weights, activation, rows.adapters)
    return groups.scatter_rows(partial, rows.counts)


def gathers(shard: RankShard, num_rows: int) -> bool:
    """Whether a step of so many rows runs weight-gathered."""
    layout = shard.layout
    return layout.mlp == "gathered" and layout.tp > 1 and num_rows >= layout.gathered_tokens


def weight_gathered(x: Tensor, weights: MlpWeights, activation: Activation, groups: Groups) -> Tensor:
    """[T, hidden] -> [T, hidden], complete (Pope et al. 2022, arXiv:2211.05102, section 3.2.2).

    Each rank computes a share of the rows with the weights of all: they pass by one rank's part at a time, so that no
    rank ever holds more than two parts. What moves is the weights, however many rows there are."""
    tp, index = groups.shard.layout.tp, groups.shard.index
    shares = [split(x.shape[0], tp, part) for part in range(tp)]
    own = x[shares[index].start : shares[index].stop]
    total = torch.zeros_like(own, dtype=torch.float32)
    for part in range(tp):
        total += dense(own, _passing(weights, part, groups), activation)
    return torch.cat(groups.gather(total.to(x.dtype), [len(share) for share in shares]))


def _passing(weights: MlpWeights, part: int, groups: Groups) -> MlpWeights:
    """The weights of the group's rank `part`, which sends its own."""

    mine = part == groups.shard.index

    def passed(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # collectives know no FP8
        tensor = tensor.contiguous() if mine else torch.empty_like(tensor)
        groups.broadcast(tensor, part)
        return tensor

    def passing(projection: Projection) -> Projection:
        own = projection.base
        if own.quantised is None:
            weight, quantised = passed(own.weight), None
        else:
            quantised = own.quantised.with_rows(*map(passed, own.quantised.tensors()))
            weight = quantised.codes
        assert weight is not None
        return Projection(dataclasses.replace(own, weight=weight, quantised=quantised, bias=passed(own.bias)))

    return MlpWeights(passing(weights.gate_up), passing(weights.down))


class Experts:
    """Routing and expert parallelism of one rank.

    `loads` counts, by layer of the rank, how often each expert was chosen: what replicas are decided from."""

    def __init__(
        self,
        spec: ModelSpec,
        shard: RankShard,
        groups: Groups,
        device: torch.device,
        replicas: Replicas | None = None,
    ) -> None:
        assert spec.moe is not None
        self._moe: MoeSpec = spec.moe
        self._activation, self._shard, self._groups = spec.activation, shard, groups
        self._part = shard.stage_rank // shard.layout.expert_tp
        self.loads = torch.zeros(len(shard.layers), spec.moe.num_experts, dtype=torch.int64, device=device)
        self.place(shard, replicas or {})

    def place(self, shard: RankShard, replicas: Replicas) -> None:
        """`shard` holds the experts that it has under `replicas`. Counting begins anew."""
        num_experts, device = self._moe.num_experts, self.loads.device
        self._holders, self._slots = [], []
        self.loads.zero_()
        for layer, resident in zip(shard.layers, shard.experts, strict=True):
            parts = place_experts(num_experts, shard.layout.ep, replicas.get(layer))
            held = [[part for part, experts in enumerate(parts) if expert in experts] for expert in range(num_experts)]
            most = max(map(len, held))
            # [num_experts, most]: the parts that hold an expert, in turn, as often as fits
            turns = [[in_parts[i % len(in_parts)] for i in range(most)] for in_parts in held]
            self._holders.append(torch.tensor(turns, device=device))
            slots = torch.full((num_experts,), -1, dtype=torch.int64, device=device)
            slots[list(resident)] = torch.arange(len(resident), device=device)
            self._slots.append(slots)

    def forward(
        self, x: Tensor, weights: MoeWeights, index: int, rows: GroupRows | None = None, live: Tensor | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], complete; every rank of the stage calls it for layer `index` of the stage.

        `rows`: where the groups of the stage share each MLP, those of all groups. `live`: see StepTensors; rows of
        padding go to no expert and count for none."""
        expert_ids, expert_weights = self._route(x, weights, index, live)
        parts = self._parts(expert_ids, index)
        if live is not None:
            parts = torch.where(live[:, None] > 0, parts, -1)
        if self._shard.layout.dp == 1:  # all ranks of the stage hold the same rows
            out = self._local(x, weights, index, expert_ids, expert_weights, parts == self._part)
        else:
            out = self._dispatched(x, weights, index, expert_ids, expert_weights, parts)
        if weights.shared is None or (rows is None and not x.shape[0]):
            return self._groups.sum(out)
        if rows is not None:
            shared = batch_sharded(x, weights.shared, self._activation, rows, self._groups)
        else:
            shared = dense(x, weights.shared, self._activation)
        if x.is_cpu and self._shard.layout.dp > 1:  # the rank that has a row's experts is one by its place in the batch
            return self._groups.sum(out) + self._groups.sum(shared)
        return self._groups.sum(out + shared)

    def _route(self, x: Tensor, weights: MoeWeights, index: int, live: Tensor | None) -> tuple[Tensor, Tensor]:
        moe = self._moe
        expert_ids, expert_weights = moe_route(
            linear(x.float(), weights.router),
            experts_per_token=moe.experts_per_token,
            scoring=moe.scoring,
            normalise=moe.normalise,
            scale=moe.scale,
            bias=weights.selection_bias,
            num_groups=moe.num_groups,
            groups_per_token=moe.groups_per_token,
            group_score=moe.group_score,
        )
        chosen = expert_ids.flatten()  # bincount would wait for the device
        counts = torch.ones_like(chosen) if live is None else live[:, None].expand_as(expert_ids).flatten()
        self.loads[index].scatter_add_(0, chosen, counts)
        return expert_ids, expert_weights

    def _parts(self, expert_ids: Tensor, index: int) -> Tensor:
        """[T, k]: the part that computes each; tokens take turns among the parts that hold an expert."""
        holders = self._holders[index]
        turn = torch.arange(expert_ids.shape[0], device=expert_ids.device) % holders.shape[1]
        return holders[expert_ids, turn[:, None]]

    def _local(
        self, x: Tensor, weights: MoeWeights, index: int, expert_ids: Tensor, expert_weights: Tensor, here: Tensor
    ) -> Tensor:
        slots = torch.where(here, self._slots[index][expert_ids], -1)
        return moe_mlp(x, weights.experts, slots, expert_weights, self._activation)

    def _dispatched(
        self, x: Tensor, weights: MoeWeights, index: int, expert_ids: Tensor, expert_weights: Tensor, parts: Tensor
    ) -> Tensor:
        """The ranks of a group share its rows out; a row goes once to each rank that has one of its experts, and comes
        back as the weighted sum of what was computed there."""
        layout, groups = self._shard.layout, self._groups
        mine = slice(self._shard.index, None, layout.tp)
        rows, parts = x[mine], parts[mine]
        # ids of the experts that the receiver is to compute, -1 for others, and their weights: [n, 2k]
        ids, shares = expert_ids[mine].float(), expert_weights[mine]
        goes = [(parts == rank // layout.expert_tp) for rank in range(layout.stage_ranks)]
        sent = [torch.nonzero(to.any(dim=1)).flatten() for to in goes]
        meta = [torch.cat((torch.where(to, ids, -1.0)[at], shares[at]), 1) for to, at in zip(goes, sent, strict=True)]
        counts = [at.numel() for at in sent]
        received = groups.exchange_counts(counts)
        here = groups.exchange(rows[torch.cat(sent)], counts, received)
        here_ids, here_weights = groups.exchange(torch.cat(meta), counts, received).chunk(2, dim=1)
        expert_ids_here = here_ids.long()
        computed = self._local(
            here, weights, index, expert_ids_here.clamp(min=0), here_weights.contiguous(), expert_ids_here >= 0
        )
        back = groups.exchange(computed, received, counts)
        total = torch.zeros_like(rows, dtype=torch.float32)
        for at, piece in zip(sent, torch.split(back, counts), strict=True):
            total[at] += piece
        out = torch.zeros_like(x)
        out[mine] = total.to(x.dtype)
        return out
