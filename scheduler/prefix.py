"""Which blocks hold which prefix: a chain of content hashes over full blocks.

hash(block i) = blake2b-256(hash(block i - 1) | token ids of block i, 8 bytes each). The root names whose KV it is: that
of the base model is blake2b-256(salt), the salt naming model, revision and dtype; that of an adapter is
blake2b-256(root of the base model | the adapter's id). Equal hashes mean equal prefixes under equal weights.

A block is published only after its KV was computed here, or was verified on arrival.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence

from scheduler.blocks import BlockPool

HASH_BYTES = 32
TOKEN_BYTES = array("q").itemsize


class PrefixCache:
    """Names and finds what the pool keeps and evicts. `enabled=False`: finds and publishes nothing.

    `on_use` is told of contents that are published or found, the deepest of a prefix first."""

    def __init__(self, pool: BlockPool, salt: bytes, *, enabled: bool = True) -> None:
        self._pool = pool
        self._enabled = enabled
        self._root = hashlib.blake2b(salt, digest_size=HASH_BYTES).digest()
        self.on_use: Callable[[Sequence[bytes]], None] | None = None

    def _root_of(self, adapter: str) -> bytes:
        if not adapter:
            return self._root
        return hashlib.blake2b(self._root + adapter.encode(), digest_size=HASH_BYTES, person=b"adapter").digest()

    def extend(self, hashes: list[bytes], token_ids: Sequence[int], adapter: str = "") -> None:
        """Appends to `hashes`, the chain so far, the hashes of the full blocks in `token_ids`, which follow on it."""
        stride = self._pool.block_tokens * TOKEN_BYTES
        content = array("q", token_ids).tobytes()
        parent = hashes[-1] if hashes else self._root_of(adapter)
        for start in range(0, len(content) - stride + 1, stride):
            parent = hashlib.blake2b(parent + content[start : start + stride], digest_size=HASH_BYTES).digest()
            hashes.append(parent)

    def hashes(self, token_ids: Sequence[int], adapter: str = "") -> list[bytes]:
        """The chain of all full blocks of `token_ids`; empty when caching is off."""
        chain: list[bytes] = []
        if self._enabled:
            self.extend(chain, token_ids, adapter)
        return chain

    def match(self, token_ids: Sequence[int], hashes: Sequence[bytes] | None = None) -> list[int]:
        """The blocks of the longest known prefix, a reference on each for the caller, who releases them.

        At most len(token_ids) - 1 tokens: one is left to compute. `hashes`: their chain; None: the base model's."""
        chain = self.hashes(token_ids) if hashes is None else hashes
        blocks: list[int] = []
        for content in chain[: max(len(token_ids) - 1, 0) // self._pool.block_tokens]:
            if (block := self._pool.find(content)) is None:
                break
            blocks.append(block)
        self._pool.hold(blocks)
        self._used(chain, 0, len(blocks))
        return blocks

    def count(self, hashes: Sequence[bytes]) -> int:
        """Blocks of this chain that match() would find now."""
        return next((i for i, content in enumerate(hashes) if self._pool.find(content) is None), len(hashes))

    def publish(self, hashes: Sequence[bytes], block_table: Sequence[int], first_block: int, end_block: int) -> None:
        """Blocks [first_block, end_block) of `block_table` hold their whole content, as the chain `hashes` names it."""
        if self._enabled:
            for index in range(first_block, end_block):
                self._pool.publish(block_table[index], hashes[index])
            self._used(hashes, first_block, end_block)

    def _used(self, hashes: Sequence[bytes], first_block: int, end_block: int) -> None:
        if self.on_use is not None and first_block < end_block:
            self.on_use(hashes[first_block:end_block][::-1])

    @property
    def enabled(self) -> bool:
        return self._enabled
