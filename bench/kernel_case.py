"""What bench.kernels is told of a kernel: how it is called, what it must compute, who else does so, and its goal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[[], Outputs]
Bound = Literal["memory", "product", "fp8 product"]


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Where tensors lie. In the Triton interpreter kernels take tensors of the CPU, in fp16: it gets bf16 wrong."""

    device: torch.device
    dtype: torch.dtype  # of activations and weights
    interpreted: bool

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """By torch.compile, which takes longer than a dry run may."""
        return function if self.interpreted else torch.compile(function, dynamic=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Peer:
    """`build` gets ready what is not timed, and raises where the peer cannot run. Its outputs are compared as the
    kernel's are, unless `tolerance` is None: they are drawn by chance."""

    build: Callable[[], Run]
    tolerance: float | None = 0.02


def relative_difference(found: Outputs, expected: Outputs) -> float:
    """The greatest difference, relative to the greatest number that was expected; of several tensors the worst."""
    worst = 0.0
    for one, other in zip(_as_tuple(found), _as_tuple(expected), strict=True):
        assert one.shape == other.shape, f"{tuple(one.shape)} for {tuple(other.shape)}"
        difference = (one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-30)
        worst = max(worst, float("inf") if bool(difference.isnan()) else float(difference))
    return worst


def share_that_differs(found: Outputs, expected: Outputs) -> float:
    """Of whole numbers."""
    (one,), (other,) = _as_tuple(found), _as_tuple(expected)
    assert one.shape == other.shape
    return float((one != other).float().mean())


def _as_tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One call at one size."""

    kernel: Run
    reference: Run
    peers: Mapping[str, Peer]
    num_bytes: float  # the least that must be read and written
    flop: float = 0.0
    difference: Callable[[Outputs, Outputs], float] = relative_difference


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """Met from `least` on; `stretch` is what would be better still.

    share   of the limit that was measured in the same run
    sheet   of the data sheet's peak; of the measured limit on a card that is not known
    rate    bytes or FLOP per second
    """

    of: Literal["share", "sheet", "rate"]
    least: float
    stretch: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """`make(setting, **sizes)`, at three sizes: `dry` is all that the interpreter takes, `check` is compared with the
    reference on a GPU, `full` is timed there."""

    name: str
    module: str | None  # of kernels/, whose `launch` this is; None: there is no kernel of ours
    make: Callable[..., Work]
    dry: Mapping[str, Any]
    check: Mapping[str, Any]
    full: Mapping[str, Any]
    bound: Bound = "memory"
    goal: Goal | None = None
    peer_goals: Mapping[str, float] = dataclasses.field(default_factory=dict)  # least times as fast as the peer
    tolerance: float = 0.02  # bfloat16 rounds at 0.4 %
