"""How the KV memory of a worker lies."""

from __future__ import annotations

import dataclasses

from spec.dtype import Dtype


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """The KV memory of one rank: [num_blocks, num_layers, 2 (key, value), num_kv_heads, block_tokens, head_dim].

    Block-major, so that a block of all layers is one contiguous piece of memory, and goes to a peer of the same layout
    as one write. A head's tokens within a block are contiguous too: the unit that survives a change of tp and pp.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: Dtype

    @property
    def token_bytes(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize_bytes

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    @property
    def run_bytes(self) -> int:
        """One head's tokens in one block and layer: [block_tokens, head_dim]."""
        return self.block_tokens * self.head_dim * self.dtype.itemsize_bytes

    @property
    def layout_id(self) -> str:
        return (
            f"blocks/l{self.num_layers}/h{self.num_kv_heads}/d{self.head_dim}/t{self.block_tokens}/{self.dtype.value}"
        )

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (num_blocks, self.num_layers, 2, self.num_kv_heads, self.block_tokens, self.head_dim)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)
