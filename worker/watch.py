"""Which layers of a step have written their KV, heard from each rank and told for a group as a whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

from engine.layer_hook import LayerHook
from kvtransfer.layer_groups import ends_within
from kvtransfer.routes import RankMemory


class StepWatch:
    """Of one step. `reached(group, layers)`: the model's layers [0, layers) of it are in the blocks of all ranks of the
    group; called in the threads that hear it, each time for more layers."""

    def __init__(
        self,
        ranks: Sequence[RankMemory],
        ends: Mapping[int, tuple[int, ...]],
        reached: Callable[[int, int], None],
    ) -> None:
        """`ranks` by number. `ends`: of layer groups, in the model's layers, for each group that is listened to."""
        self.ends = ends
        self._ranks = ranks
        self._reached = reached
        self._lock = threading.Lock()
        self._written = [0] * len(ranks)
        self._told = dict.fromkeys(ends, 0)

    def hook(self, rank: int) -> LayerHook | None:
        """For the engine of a rank in this process."""
        held = self._ranks[rank]
        if held.group not in self.ends:
            return None
        return LayerHook(ends_within(self.ends[held.group], held.kv.layers), lambda end: self.written(rank, end))

    def written(self, rank: int, end: int) -> None:
        """The rank's layers [0, end)."""
        group = self._ranks[rank].group
        with self._lock:
            self._written[rank] = max(self._written[rank], end)
            layers = self._written_by_all(group)
            if layers <= self._told[group]:
                return
            self._told[group] = layers
        self._reached(group, layers)

    def _written_by_all(self, group: int) -> int:
        each = zip(self._ranks, self._written, strict=True)
        held = [(rank.kv.layers, end) for rank, end in each if rank.group == group]
        unwritten = [layers.start + end for layers, end in held if end < len(layers)]
        return min(unwritten, default=max(layers.stop for layers, _ in held))
