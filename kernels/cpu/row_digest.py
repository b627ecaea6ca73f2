"""The compiled XXH3-128 over rows of memory, row_digest.cpp: addresses in, 16 bytes out. It loads no torch."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

from kernels.cpu.build import BuildFailed, build

SHORT_BYTES = 240  # XXH3 treats no more than so many otherwise; they are kept, for others to digest


class RowDigest:
    """Begun; rows are added by one thread at a time, which lets others run meanwhile."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._state = ctypes.create_string_buffer(handle.legato_digest_bytes())
        handle.legato_digest_begin(self._state)

    def add(self, base: int, units: int, num_units: int, segments: int, sizes: int, num_segments: int) -> None:
        """The rows at base + units[u] + segments[s], sizes[s] bytes each: all segments of one unit, then of the next.

        base, units, segments, sizes: addresses; the last three of int64 arrays in bytes, which only this call reads."""
        self._handle.legato_digest_rows(self._state, base, units, num_units, segments, sizes, num_segments)

    def few(self) -> bytes | None:
        """All bytes that came, where they are at most SHORT_BYTES."""
        total = int.from_bytes(self._state.raw[:8], "little")
        return self._state.raw[8 : 8 + total] if total <= SHORT_BYTES else None

    def digest(self) -> bytes:
        """Of more than SHORT_BYTES."""
        out = ctypes.create_string_buffer(16)
        self._handle.legato_digest_end(self._state, out)
        return out.raw


@functools.cache
def shared_digests() -> Any | None:
    """What a RowDigest is made with. Compiled at the first call (seconds). None where it cannot be had, said once."""
    try:
        handle = ctypes.CDLL(str(build()))
    except (BuildFailed, OSError) as error:
        logging.getLogger(__name__).warning("blocks are digested with copies of them, slower: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    handle.legato_digest_bytes.restype = number
    handle.legato_digest_begin.argtypes = [pointer]
    handle.legato_digest_rows.argtypes = [pointer, pointer, pointer, number, pointer, pointer, number]
    handle.legato_digest_end.argtypes = [pointer, pointer]
    for name in ("begin", "rows", "end"):
        getattr(handle, f"legato_digest_{name}").restype = None
    return handle
