"""The sharding table: how each word of a weight's shape (engine/families.py) is cut for a rank.

    queries, keys, heads, latent_*       by head: a rank holds its query heads and their KV heads
    intermediate, shared_intermediate    by column of the MLP, among the ranks that share it
    expert_intermediate, expert_pairs    by column of the expert, among the ranks that share it
    vocab                                by row of embedding and head
    every other word                     whole, on every rank

A weight whose last dimension is cut gives partial sums; its bias belongs to the first of the ranks that are summed.

Where GPTQ lets any inputs of a weight share a scale (desc_act), inputs that are cut where they lie would leave each
rank a part of every group. So the channels within an MLP are put in the order of the groups of its down projection, for
all its weights alike (Hoque et al. 2024, arXiv:2402.04925), and a rank holds whole groups of it. Those of attention
belong to heads, which are where their KV is: its output projection is cut along its outputs, and reads all heads.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from engine.families import Weight, sizes_of
from kernels.quantised import QuantisedWeight
from spec.errors import InvalidConfiguration
from spec.model import ModelSpec
from spec.shard import RankShard, split


class Cutter:
    def __init__(self, spec: ModelSpec, shard: RankShard) -> None:
        self._sizes, self.spec, self.shard = sizes_of(spec), spec, shard
        cuts = {
            "vocab": shard.held_vocab,
            "heads": shard.heads,
            "queries": _scaled(shard.heads, spec.head_dim),
            "keys": _scaled(shard.kv_heads, spec.head_dim),
            "intermediate": shard.intermediate,
            "expert_intermediate": shard.expert_intermediate,
            "expert_pairs": _scaled(shard.expert_intermediate, 2),
        }
        if spec.moe is not None:
            shared_size = spec.moe.shared_intermediate_size
            cuts["shared_intermediate"] = split(shared_size, shard.layout.dense_tp, shard.dense_part)
        if (latent := spec.latent) is not None:
            cuts |= {
                "latent_queries": _scaled(shard.heads, latent.plain_dim + latent.rope_dim),
                "latent_up": _scaled(shard.heads, latent.plain_dim + latent.value_dim),
                "latent_values": _scaled(shard.heads, latent.value_dim),
            }
        self._cuts = cuts
        self._orders: dict[str, Tensor] = {}

    def in_order(self, word: str, order: Tensor) -> Cutter:
        """One for weights of which the indices of `word` are put in this order, [size] int64, before they are cut."""
        found = copy.copy(self)
        found._orders = {word: order}
        return found

    def along_hidden(self) -> Cutter:
        """One that cuts the output of attention among the ranks of the group, [hidden / tp, all heads]."""
        found = copy.copy(self)
        found._cuts = {"hidden": split(self.spec.hidden_size, self.shard.layout.tp, self.shard.index)}
        return found

    def ranges(self, word: str) -> list[range] | None:
        """Of [0, size) of the word, what the rank holds, in order; None: all of it."""
        parts, start, found = word.split("+"), 0, []
        if not any(part in self._cuts for part in parts):
            return None
        for part in parts:
            own = self._cuts.get(part, range(self._sizes[part]))
            found.append(range(start + own.start, start + own.stop))
            start += self._sizes[part]
        return None if sum(map(len, found)) == start else found

    def indices(self, word: str) -> Tensor | None:
        """As `ranges`, one by one: [n] int64."""
        parts, start, found = word.split("+"), 0, []
        if self.ranges(word) is None and not any(part in self._orders for part in parts):
            return None
        for part in parts:
            own = self._cuts.get(part, range(self._sizes[part]))
            order = self._orders.get(part)
            found.append(start + (torch.arange(own.start, own.stop) if order is None else order[own.start : own.stop]))
            start += self._sizes[part]
        return torch.cat(found)

    def cut(self, tensor: Tensor, words: tuple[str, ...]) -> Tensor:
        """The rank's part of a tensor whose dimensions are `words`; a view where it is one run."""
        for dimension, word in enumerate(words):
            ranges = self.ranges(word)
            if any(part in self._orders for part in word.split("+")):
                tensor = tensor.index_select(dimension, _present(self.indices(word)))
            elif ranges is not None:
                pieces = [tensor.narrow(dimension, own.start, len(own)) for own in ranges]
                tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dimension)
        return tensor

    def cut_quantised(self, weight: QuantisedWeight, words: tuple[str, ...]) -> QuantisedWeight:
        """As `cut` of [N, K]. Raises InvalidConfiguration where a group of columns that share a scale would be cut,
        and for weights that change size where they are to pass from rank to rank."""
        if (rows := self.indices(words[0])) is not None:
            weight = weight[rows]
        if words[1] in self._orders:
            return self._in_groups(weight, words[1])
        columns = self.ranges(words[1])
        if columns is None:
            return weight
        (own,) = columns
        if not weight.can_cut(own.start, own.stop):
            raise InvalidConfiguration(
                f"{self.shard.layout} cuts {weight.k} columns at {own.start} and {own.stop}, within a quantised group "
                f"of {weight.group}; a smaller tp does not"
            )
        return weight.columns(own.start, own.stop)

    def _in_groups(self, weight: QuantisedWeight, word: str) -> QuantisedWeight:
        own = _present(self.indices(word))
        whole_groups = len(own) % weight.group == 0 and weight.k == weight.inputs
        if not whole_groups and self.shard.layout.mlp == "gathered" and word == "intermediate":
            raise InvalidConfiguration(
                f"{self.shard.layout} passes weights from rank to rank, and those of GPTQ in the order of activations "
                f"(desc_act) have other sizes on each where a group of {weight.group} is cut; mlp stationary does not"
            )
        return weight.of_inputs(own)

    def owns_bias(self, weight: Weight) -> bool:
        """Whether the rank adds the bias. Where sums of several ranks are added up, the first of them does."""
        shard = self.shard
        summed_over = weight.shape[1] if len(weight.shape) == 3 else weight.shape[-1]
        if self.ranges(summed_over) is None:
            return True
        if summed_over == "expert_intermediate":
            return shard.stage_rank % shard.layout.expert_tp == 0
        if summed_over in ("intermediate", "shared_intermediate"):
            return shard.dense_part == 0
        return shard.index == 0


def _present(indices: Tensor | None) -> Tensor:
    assert indices is not None
    return indices


def _scaled(units: range, size: int) -> range:
    return range(units.start * size, units.stop * size)
