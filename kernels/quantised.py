"""Weights of four or eight bits, in one form whatever file they come from.

    value[n, k] = (scales[n, k // group] · number(codes[n, k]) + offsets[n, k // group]) · output_scales[n]

    kind    number                                      such weights
    int8    -128 ... 127                                Q8_0, compressed-tensors; a scale per output or group
    int4    -8 ... 7, stored as 0 ... 15                GPTQ, AWQ, Q4_0; with offsets Q4_1 and zero points
    fp8     E4M3 without infinities                     DeepSeek's blocks of 128 x 128; a scale per tensor or output
    fp4     E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and sign   MXFP4 (E8M0 scale per 32), NVFP4 (E4M3 per 16, one per tensor)

A zero point z of codes 0 ... 15 is the offset scale · (8 - z). Rows that a weight of fp8 multiplies may be rounded to
E4M3 themselves (kernels/fp8_linear.py); all other activations are kept as they are.

GPTQ in the order of activations (desc_act) lets any inputs share a scale: columns are then put together by their group
as they are loaded, `order` says which input each is, and a product reads its rows in that order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["int8", "int4", "fp8", "fp4"]
Activations = Literal["kept", "fp8"]
KINDS: tuple[Kind, ...] = get_args(Kind)

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn)
OFFSET_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CODE_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn, "fp4": torch.uint8}
NUMBERS: dict[str, tuple[float, ...]] = {
    "int4": tuple(float(code - 8) for code in range(16)),
    "fp4": (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
}
LARGEST = {"int8": 127.0, "fp8": 448.0}
GROUP_MULTIPLE = 8


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """A weight [N, K]. Tensors lie on one device, and those that an output has of its own are row by row."""

    kind: Kind
    codes: Tensor  # [N, K] int8 or float8_e4m3fn; four bits: [N, ceil(K / 2)] uint8, an even k in the low half
    scales: Tensor  # [N, ceil(K / group)], one of SCALE_DTYPES
    k: int
    group: int  # a multiple of 8; or K or more: one scale per output
    offsets: Tensor | None = None  # as the scales, one of OFFSET_DTYPES
    output_scales: Tensor | None = None  # [N] float32
    order: Tensor | None = None  # [K] int64: the input that a column is of, -1: of none, it counts for nothing
    activations: Activations = "kept"  # what the rows that it is multiplied with are rounded to

    def __post_init__(self) -> None:
        width = -(-self.k // 2) if self.kind in NUMBERS else self.k
        groups = (self.codes.shape[0], -(-self.k // self.group))
        assert self.group % GROUP_MULTIPLE == 0 or self.group >= self.k
        assert self.codes.shape == (self.n, width)
        assert self.codes.dtype == CODE_DTYPES[self.kind]
        assert self.scales.shape == groups
        assert self.scales.dtype in SCALE_DTYPES
        assert self.offsets is None or (self.offsets.shape == groups and self.offsets.dtype in OFFSET_DTYPES)
        assert self.output_scales is None or self.output_scales.shape == (self.n,)
        assert self.output_scales is None or self.output_scales.dtype == torch.float32
        assert self.activations == "kept" or (self.kind == "fp8" and self.order is None)
        assert self.order is None or (self.order.shape == (self.k,) and self.order.dtype == torch.int64)

    @property
    def n(self) -> int:
        return self.codes.shape[0]

    @property
    def inputs(self) -> int:
        """The length of a row that it is multiplied with."""
        return self.k if self.order is None else int((self.order >= 0).sum())

    def __getitem__(self, outputs: slice | Tensor) -> QuantisedWeight:
        """The weight of these outputs: a slice of rows, or [M] int64."""
        return self.with_rows(*(None if tensor is None else _bytes_of(tensor)[outputs] for tensor in self.tensors()))

    def can_cut(self, start: int, stop: int) -> bool:
        """Whether inputs [start, stop) are whole groups and whole bytes, or have an order that is made anew."""
        if self.order is not None:
            return True
        unit = GROUP_MULTIPLE if self.group >= self.k else self.group
        return start % unit == 0 and (stop % unit == 0 or stop == self.k)

    def columns(self, start: int, stop: int) -> QuantisedWeight:
        """The weight of these inputs."""
        assert self.can_cut(start, stop)
        if self.order is not None:
            return self.of_inputs(torch.arange(start, stop))
        per_byte = 2 if self.kind in NUMBERS else 1
        codes = _bytes_of(self.codes)[:, start // per_byte : -(-stop // per_byte)].contiguous().view(self.codes.dtype)
        groups = slice(None) if self.group >= self.k else slice(start // self.group, -(-stop // self.group))
        scales = _bytes_of(self.scales)[:, groups].contiguous().view(self.scales.dtype)
        offsets = None if self.offsets is None else self.offsets[:, groups].contiguous()
        new = QuantisedWeight(self.kind, codes, scales, stop - start, self.group, offsets, self.output_scales)
        return dataclasses.replace(new, activations=self.activations)

    def of_inputs(self, inputs: Tensor) -> QuantisedWeight:
        """The weight of these inputs, [M] int64 without repeats, in this order. For weights that have an order; what is
        whole groups one after the other then has none."""
        assert self.order is not None
        places = torch.full((self.inputs + 1,), -1)  # the last is that of columns of no input
        places[inputs] = torch.arange(len(inputs))
        own = (places[self.order] >= 0).nonzero().flatten()
        factors = (self.scales, self.offsets, self.output_scales)
        found = ordered(self.kind, _one_each(self)[:, own], own // self.group, places[self.order[own]], *factors)
        in_place = torch.equal(cast(Tensor, found.order), torch.arange(found.k))
        return dataclasses.replace(found, order=None) if in_place else found

    def to(self, device: torch.device) -> QuantisedWeight:
        moved = self.with_rows(*(None if tensor is None else tensor.to(device) for tensor in self.tensors()))
        return moved if self.order is None else dataclasses.replace(moved, order=self.order.to(device))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Those that have a row for each output."""
        return self.codes, self.scales, self.offsets, self.output_scales

    def with_rows(self, *tensors: Tensor | None) -> QuantisedWeight:
        """Of other outputs, of the same form: tensors as `tensors` gives them, or their bytes."""
        codes, scales, offsets, output_scales = (
            None if new is None or old is None else new.view(old.dtype)
            for new, old in zip(tensors, self.tensors(), strict=True)
        )
        assert codes is not None
        assert scales is not None
        return dataclasses.replace(self, codes=codes, scales=scales, offsets=offsets, output_scales=output_scales)


def alike(weights: Sequence[QuantisedWeight]) -> bool:
    """Whether they can be one weight: of one kind, K, group, order of columns, activations and dtypes."""
    first = weights[0]
    forms = {(weight.kind, weight.k, weight.group, weight.order is None, weight.activations) for weight in weights}
    dtypes = {tuple(None if tensor is None else tensor.dtype for tensor in weight.tensors()) for weight in weights}
    if len(forms) > 1 or len(dtypes) > 1:
        return False
    return all(first.order is None or torch.equal(first.order, cast(Tensor, weight.order)) for weight in weights[1:])


def concatenate(parts: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """One after the other along the outputs, all alike: a fused projection."""
    assert alike(parts)
    columns = zip(*(part.tensors() for part in parts), strict=True)
    return parts[0].with_rows(
        *(None if column[0] is None else torch.cat([_bytes_of(t) for t in column]) for column in columns)
    )


def ordered(
    kind: Kind,
    codes: Tensor,
    group_of: Tensor,
    inputs: Tensor,
    scales: Tensor,
    offsets: Tensor | None = None,
    output_scales: Tensor | None = None,
) -> QuantisedWeight:
    """Columns in any order put together by their group. codes: [N, C], one in a byte; group_of: [C] int64, the column
    of scales and offsets [N, G] that is a code's; inputs: [C] int64, 0 ... C - 1 in any order, the input that it is of.

    Groups become runs of one size, the one that takes the fewest bytes. A large group has several, of which the last is
    filled up with columns of no input."""
    members = [(group_of == group).nonzero().flatten() for group in range(scales.shape[1])]
    members = [columns for columns in members if len(columns)]
    counts = [len(columns) for columns in members]
    factor_bytes = scales.element_size() + (0 if offsets is None else offsets.element_size())

    def output_bytes(run: int) -> float:
        runs = sum(-(-count // run) for count in counts)
        return (runs * run - -counts[-1] % run) * (0.5 if kind in NUMBERS else 1.0) + runs * factor_bytes

    run = min({-(-max(counts) // GROUP_MULTIPLE) * GROUP_MULTIPLE, 8, 16, 32, 64, 128}, key=output_bytes)
    columns = torch.cat([F.pad(column, (0, -len(column) % run), value=-1) for column in members])
    columns = columns[: columns.numel() - -counts[-1] % run]  # what is last need not be filled up
    groups = group_of[columns[::run]]
    assert int(groups.min()) >= 0
    placed = F.pad(codes.view(torch.uint8), (0, 1))[:, columns]  # -1 reads what was added
    packed = nibbles(placed) if kind in NUMBERS else placed.view(CODE_DTYPES[kind])
    return QuantisedWeight(
        kind,
        packed,
        _bytes_of(scales)[:, groups].contiguous().view(scales.dtype),
        columns.numel(),
        run,
        None if offsets is None else offsets[:, groups].contiguous(),
        output_scales,
        torch.where(columns < 0, -1, inputs[columns]),
    )


def by_input(values: Tensor, order: Tensor | None) -> Tensor:
    """[N, K] of columns in an order to [N, inputs]."""
    if order is None:
        return values
    columns = (order >= 0).nonzero().flatten()
    out = values.new_empty(values.shape[0], columns.numel())
    out[:, order[columns]] = values[:, columns]
    return out


def dequantise(weight: QuantisedWeight) -> Tensor:
    """[N, inputs] float32. What every kernel's product is measured against."""
    if weight.kind in NUMBERS:
        values = _numbers(weight.kind, weight.codes.device)[_one_each(weight).long()]
    else:
        values = weight.codes.float()
    values = values * _spread(weight.scales, weight)
    if weight.offsets is not None:
        values = values + _spread(weight.offsets, weight)
    values = values if weight.output_scales is None else values * weight.output_scales[:, None]
    return by_input(values, weight.order)


def nibbles(codes: Tensor) -> Tensor:
    """[N, K] of 0 ... 15 to [N, ceil(K / 2)] uint8, an even k in the low half."""
    codes = F.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return codes[:, ::2] | codes[:, 1::2] << 4


def _one_each(weight: QuantisedWeight) -> Tensor:
    """[N, K] uint8: a byte for each code."""
    if weight.kind not in NUMBERS:
        return weight.codes.view(torch.uint8)
    return torch.stack([weight.codes & 15, weight.codes >> 4], dim=-1).flatten(1)[:, : weight.k]


@functools.cache
def _numbers(kind: Kind, device: torch.device) -> Tensor:
    """[16] float32, kept: on a GPU a step that brings them there would wait for it."""
    return torch.tensor(NUMBERS[kind], device=device)


def quantise(weight: Tensor, kind: Kind, group: int | None = None) -> QuantisedWeight:
    """weight: [N, K] of any float dtype. Symmetric, rounded to nearest and saturated; not for fp4.

    A float32 scale per output, or with `group` a float16 one per group of K. The greatest magnitude takes the greatest
    number; in int4 it takes -8 whatever its sign, so that all sixteen numbers are of use (as Q4_0 has it).
    """
    assert kind != "fp4"
    n, k = weight.shape
    group = k if group is None else group
    groups = F.pad(weight.float(), (0, -k % group)).view(n, -1, group)
    if kind == "int4":
        scales = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2) / -8
    else:
        scales = groups.abs().amax(2) / LARGEST[kind]
    scales = scales if group >= k else scales.half()
    divisor = scales.float()[:, :, None]
    numbers = torch.where(divisor == 0, 0, groups / divisor).view(n, -1)[:, :k]
    if kind == "fp8":
        codes = numbers.clamp(-LARGEST[kind], LARGEST[kind]).to(torch.float8_e4m3fn)
    elif kind == "int8":
        codes = numbers.round().clamp(-LARGEST[kind], LARGEST[kind]).to(torch.int8)
    else:
        codes = nibbles(numbers.round().clamp(-8, 7) + 8)
    return QuantisedWeight(kind, codes.contiguous(), scales, k, group)


def _spread(factors: Tensor, weight: QuantisedWeight) -> Tensor:
    """[N, groups] -> [N, K] float32."""
    return factors.float().repeat_interleave(min(weight.group, weight.k), dim=1)[:, : weight.k]


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory in a dtype of which torch can index and join rows: it cannot do so with all of those here."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
