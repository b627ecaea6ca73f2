"""Paged KV memories between guards of noise, and what of one a copy of rows must have changed."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.kv_pack import Corner
from kernels.kv_rows import convert_rows
from kvtransfer.digest import HeldDigest
from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory
from spec.dtype import Dtype
from spec.layout import KVLayout

DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.INT8: torch.int8,
    Dtype.FLOAT8_E4M3: torch.float8_e4m3fn,
}
GUARD_BYTES = 128
CORNER = Corner(5, 2)


class Shape(NamedTuple):
    layers: int
    planes: int
    heads: int
    dim: int
    source_tokens: int  # of a block
    target_tokens: int


@dataclasses.dataclass(frozen=True)
class Copy:
    """Tokens [first, first + count) of a sequence whose tables begin at token `table_token`."""

    shape: Shape
    source_dtype: Dtype
    target_dtype: Dtype
    first: int
    count: int
    table_token: int = 0

    @property
    def end(self) -> int:
        return self.first + self.count

    def layout(self, *, is_target: bool) -> KVLayout:
        shape = self.shape
        tokens = shape.target_tokens if is_target else shape.source_tokens
        dtype = self.target_dtype if is_target else self.source_dtype
        return KVLayout(shape.layers, shape.heads, shape.dim, tokens, dtype, planes=shape.planes)

    def table(self, *, is_target: bool) -> tuple[Tensor, int]:
        """(blocks in no order, of how many that there are)."""
        needed = self.layout(is_target=is_target).blocks_for(self.end - self.table_token)
        return torch.randperm(needed + 3)[:needed], needed + 3

    def memories(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """source, its table, target, its table, and all the bytes that the target lies among."""
        (from_table, from_blocks), (to_table, to_blocks) = (self.table(is_target=each) for each in (False, True))
        values = torch.randn((*self.layout(is_target=False).shape(from_blocks)[:5], self.shape.dim))
        source = convert_rows(
            values * torch.logspace(-2, 2, self.shape.heads)[:, None, None], DTYPES[self.source_dtype]
        )
        layout = self.layout(is_target=True)
        around = torch.randint(256, (to_blocks * layout.block_bytes + 2 * GUARD_BYTES,), dtype=torch.uint8)
        target = around[GUARD_BYTES:-GUARD_BYTES].view(DTYPES[self.target_dtype]).view(layout.shape(to_blocks))
        return source, from_table, target, to_table, around

    def digest(self, target: Tensor, table: Tensor) -> bytes:
        """What the CPU finds in the target."""
        layout, corner = self.layout(is_target=True), CORNER
        layers = range(corner.layer, corner.layer + layout.num_layers)
        heads = range(corner.head, corner.head + layout.num_kv_heads)
        block_ids = [0] * (self.table_token // layout.block_tokens) + table.tolist()
        held = HeldDigest(RankMemory(RankKV(layout, layers, heads)), target, block_ids, self.first, self.count)
        for call in held.counting(layers):
            call()
        return held.digest()


PLAIN = Shape(2, 2, 3, 24, 4, 4)
COPIES = {
    "one token": Copy(PLAIN, Dtype.BFLOAT16, Dtype.BFLOAT16, 5, 1),
    "partial blocks at both ends": Copy(PLAIN, Dtype.FLOAT16, Dtype.FLOAT16, 3, 11),
    "other blocks": Copy(Shape(2, 2, 3, 7, 5, 3), Dtype.BFLOAT16, Dtype.BFLOAT16, 17, 12, 15),
    "larger blocks": Copy(Shape(1, 2, 2, 33, 3, 16), Dtype.FLOAT32, Dtype.FLOAT32, 48, 25, 48),
    "latent, two blocks of stripes": Copy(Shape(2, 1, 1, 576, 4, 4), Dtype.BFLOAT16, Dtype.BFLOAT16, 1, 6),
    "latent, three blocks of stripes": Copy(Shape(1, 1, 1, 600, 2, 4), Dtype.FLOAT32, Dtype.FLOAT32, 3, 2),
    "rows of codes": Copy(Shape(2, 2, 2, 13, 4, 4), Dtype.INT8, Dtype.INT8, 2, 9),
    "rows of codes, aligned": Copy(Shape(1, 2, 3, 128, 16, 16), Dtype.FLOAT8_E4M3, Dtype.FLOAT8_E4M3, 0, 20),
    "long rows become codes": Copy(Shape(1, 1, 1, 1100, 2, 2), Dtype.FLOAT32, Dtype.INT8, 0, 3),
    "long codes become rows": Copy(Shape(1, 1, 1, 576, 2, 2), Dtype.FLOAT8_E4M3, Dtype.FLOAT16, 1, 2),
    **{
        f"{source.value} to {target.value}": Copy(Shape(2, 2, 3, 21, 4, 3), source, target, 14, 9, 12)
        for source in Dtype
        for target in Dtype
        if source is not target
    },
}
