"""The compiled copy of many pieces, copy_grid.cpp, for those who have no tensor: it loads no torch.

It may be called from any thread. A long copy lets other threads of this interpreter run; a brief one keeps the lock,
since to get it back from a thread that computes takes milliseconds.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable

from kernels.cpu.build import BuildFailed, build

BRIEF_BYTES = 64 << 10

Addresses = tuple[int | None, int | None]  # of int64 arrays: bases [S] and units [U]; None, None where it is packed


@functools.cache
def shared_copy() -> Callable[[int, int, Addresses, Addresses, Addresses, int, int, int], None] | None:
    """copy(source, target, source_places, target_places, sizes, S, U, total bytes), as copy_grid.cpp says it; `sizes`
    are segment_bytes and unit_runs. Compiled at the first call (seconds). None where it cannot be had, said once."""
    try:
        path = str(build())
        functions = [loader(path).legato_copy_grid for loader in (ctypes.PyDLL, ctypes.CDLL)]
    except (BuildFailed, OSError) as error:
        logging.getLogger(__name__).warning("pieces of memory are copied one by one, slower: %s", error)
        return None
    for function in functions:
        function.restype, function.argtypes = None, [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 2
    brief, long = functions

    def copy(
        source: int,
        target: int,
        source_places: Addresses,
        target_places: Addresses,
        sizes: Addresses,
        num_segments: int,
        num_units: int,
        total_bytes: int,
    ) -> None:
        function = brief if total_bytes <= BRIEF_BYTES else long
        function(source, target, *source_places, *target_places, *sizes, num_segments, num_units)

    return copy
