"""Every KV block of a worker, and who holds it.

    free     no reference, no content        allocate() takes it first
    held     one reference or more           its content stays; only the one who allocated it writes
    cached   no reference, content published find() brings it back; allocate() evicts the least recently used

    allocate: free | cached -> held (new generation)      hold: any -> held      release: held -> cached | free

free + held + cached == num_blocks, always. A block's generation grows whenever it is allocated: a pair (block,
generation) names one owner of its content for ever, and who comes late with an old pair is told apart.

BlockPool counts; what a content key means is `scheduler/prefix.py`'s.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

from spec.errors import OutOfBlocks


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens each. Not thread-safe: one owner at a time."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        assert num_blocks > 0
        assert block_tokens > 0
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.evictions = 0
        self._references = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._contents: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: dict[int, None] = dict.fromkeys(reversed(range(num_blocks)))
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def available(self) -> int:
        """Blocks that allocate() can give now: free, or cached and evictable."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def generation(self, block: int) -> int:
        return self._generations[block]

    def references(self, block: int) -> int:
        return self._references[block]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for new content, one reference each. Raises OutOfBlocks, and then takes none."""
        if count > self.available:
            raise OutOfBlocks(f"{count} KV blocks are wanted, {self.available} of {self.num_blocks} are available")
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block, _ = self._free.popitem()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
            self.evictions += 1
        self._references[block] = 1
        self._generations[block] += 1
        return block

    def _forget(self, block: int) -> None:
        content = self._contents[block]
        assert content is not None
        del self._block_of[content]
        self._contents[block] = None

    def hold(self, blocks: Sequence[int]) -> tuple[int, ...]:
        """One more reference on each, so that its content stays; returns them, for the release() that must follow.

        A block without a reference may be held too, by one who knows that it was not allocated since."""
        for block in blocks:
            if self._references[block] == 0:
                if self._contents[block] is None:
                    del self._free[block]
                else:
                    del self._cached[block]
            self._references[block] += 1
        return tuple(blocks)

    def release(self, blocks: Sequence[int]) -> None:
        """Gives one reference of each back. Later blocks of a table are evicted before earlier ones."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} is released once too often"
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._contents[block] is None:
                    self._free[block] = None
                else:
                    self._cached[block] = None

    def publish(self, block: int, content: bytes) -> bool:
        """The held block holds exactly `content`, complete, and is not written any more: find() may give it to others.

        False when another block stands for that content already; then this one stays its holders' own."""
        assert self._references[block] > 0
        assert self._contents[block] in (None, content)
        if self._block_of.setdefault(content, block) != block:
            return False
        self._contents[block] = content
        return True

    def find(self, content: bytes) -> int | None:
        """The block that holds `content`; hold() it before anything else happens."""
        return self._block_of.get(content)

    def check(self, holders: Mapping[int, int] | None = None) -> None:
        """Asserts the invariants; with `holders` (block -> references) also that these are all references there are."""
        held = {block for block, references in enumerate(self._references) if references > 0}
        assert all(references >= 0 for references in self._references)
        assert len(held) + len(self._free) + len(self._cached) == self.num_blocks
        assert held | self._free.keys() | self._cached.keys() == set(range(self.num_blocks))
        assert all(self._contents[block] is None for block in self._free)
        assert all(self._contents[block] is not None for block in self._cached)
        published = {content: block for block, content in enumerate(self._contents) if content is not None}
        assert published == self._block_of
        if holders is not None:
            counted = {block: count for block, count in enumerate(self._references) if count}
            assert counted == {block: count for block, count in holders.items() if count}


def count_references(tables: Iterable[Iterable[int]]) -> collections.Counter[int]:
    """How often each block stands in these tables; what check() compares with."""
    return collections.Counter(block for table in tables for block in table)
