"""What one tier below the KV blocks (host memory, disk) keeps: contents by their prefix hash, least recently used first
out. The bytes are somebody else's.

The hash of a block names the whole prefix up to it, its model and its adapter (scheduler/prefix.py). A block is of use
only with those before it, so whoever uses several uses the deepest first: the end of a prefix then goes before its
beginning.
"""

from __future__ import annotations

import collections


class TierIndex:
    """At most `capacity_bytes` of contents. Not thread-safe: one owner at a time."""

    def __init__(self, capacity_bytes: int) -> None:
        assert capacity_bytes >= 0
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._sizes: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, content: bytes) -> bool:
        return content in self._sizes

    def use(self, content: bytes) -> bool:
        """It is the last to go from here on. False: it is not here."""
        if content not in self._sizes:
            return False
        self._sizes.move_to_end(content)
        return True

    def admit(self, content: bytes, num_bytes: int) -> list[bytes] | None:
        """It is here from now on, as the most recently used; returns those that had to go for it. None: it does not fit
        at all, and nothing has changed."""
        assert num_bytes > 0
        assert content not in self._sizes
        if num_bytes > self.capacity_bytes:
            return None
        evicted = self.in_the_way_of(num_bytes)
        for oldest in evicted:
            self.drop(oldest)
        self._sizes[content] = num_bytes
        self.used_bytes += num_bytes
        return evicted

    def in_the_way_of(self, num_bytes: int) -> list[bytes]:
        """Those that have to go for so many bytes more, in that order; nothing changes."""
        over_bytes = self.used_bytes + num_bytes - self.capacity_bytes
        found = []
        for content, size in self._sizes.items():
            if over_bytes <= 0:
                break
            found.append(content)
            over_bytes -= size
        return found

    def drop(self, content: bytes) -> bool:
        """False: it is not here."""
        if (size := self._sizes.pop(content, None)) is None:
            return False
        self.used_bytes -= size
        return True

    def check(self) -> None:
        """Asserts the invariants."""
        assert self.used_bytes == sum(self._sizes.values()) <= self.capacity_bytes
