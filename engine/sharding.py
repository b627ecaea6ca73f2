"""The sharding table: how each word of a weight's shape (engine/families.py) is cut for a rank.

    queries, keys, heads, latent_*       by head: a rank holds its query heads and their KV heads
    intermediate, shared_intermediate    by column of the MLP, among the ranks that share it
    expert_intermediate, expert_pairs    by column of the expert, among the ranks that share it
    vocab                                by row of embedding and head
    every other word                     whole, on every rank

A weight whose last dimension is cut gives partial sums; its bias belongs to the first of the ranks that are summed.
"""

from __future__ import annotations

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

    def cut(self, tensor: Tensor, words: tuple[str, ...]) -> Tensor:
        """The rank's part of a tensor whose dimensions are `words`; a view where it is one run."""
        for dimension, word in enumerate(words):
            ranges = self.ranges(word)
            if ranges is not None:
                pieces = [tensor.narrow(dimension, own.start, len(own)) for own in ranges]
                tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dimension)
        return tensor

    def cut_quantised(self, weight: QuantisedWeight, words: tuple[str, ...]) -> QuantisedWeight:
        """As `cut` of [N, K]. Raises InvalidConfiguration where a group of columns that share a scale would be cut,
        and for weights that change size where they are to pass from rank to rank."""
        if (rows := self.ranges(words[0])) is not None:
            weight = weight[torch.cat([torch.arange(own.start, own.stop) for own in rows])]
        columns = self.ranges(words[1])
        if columns is None:
            return weight
        (own,) = columns
        if weight.order is not None and self.shard.layout.mlp == "gathered" and words[1] == "intermediate":
            raise InvalidConfiguration(
                f"{self.shard.layout} passes weights from rank to rank, and those of GPTQ in the order of activations "
                f"(desc_act) have other sizes on each; mlp stationary does not"
            )
        if not weight.can_cut(own.start, own.stop):
            raise InvalidConfiguration(
                f"{self.shard.layout} cuts {weight.k} columns at {own.start} and {own.stop}, within a quantised group "
                f"of {weight.group}; a smaller tp does not"
            )
        return weight.columns(own.start, own.stop)

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


def _scaled(units: range, size: int) -> range:
    return range(units.start * size, units.stop * size)
