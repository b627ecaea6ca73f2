"""A linear layer as the decoder uses it: the packed weight, and the low-rank adapters that single rows may ask for.

    y = W x + scale · B (A x)        (LoRA, Hu et al. 2021, arXiv:2106.09685) for the rows of an adapter, W x for others

Rows of many adapters share one batch: W is applied to all of them at once, A and B to each adapter's rows (Punica,
arXiv:2310.18547). A row's result does not depend on which adapters its neighbours ask for.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

from kernels.linear import PackedLinear, linear

Segments = tuple[tuple[str, Tensor], ...]  # (adapter, its rows in the step, [n] int64)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """Of one adapter and one projection, fused as the projection is: `up` holds the scale, and where several weights
    are fused, each reads its own columns."""

    down: PackedLinear  # [total rank, in]
    up: PackedLinear  # [out, total rank]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Projection:
    base: PackedLinear
    adapters: dict[str, LowRank] = dataclasses.field(default_factory=dict)

    def __call__(self, x: Tensor, segments: Segments = ()) -> Tensor:
        """x: [T, in]. Returns [T, out] in x.dtype."""
        out = linear(x, self.base)
        for name, rows in segments:
            if (pair := self.adapters.get(name)) is not None:
                out[rows] += linear(linear(x[rows], pair.down), pair.up)
        return out
