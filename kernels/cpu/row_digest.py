"""The compiled sums over rows of memory, row_digest.cpp, for those who have no tensor: it loads no torch."""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

from kernels.cpu.build import BuildFailed, build


@functools.cache
def shared_row_sums() -> Any | None:
    """legato_row_sums(), as row_digest.cpp says it. It may be called from any thread and lets others run meanwhile.
    Compiled at the first call (seconds). None where it cannot be had, said once."""
    try:
        function = ctypes.CDLL(str(build())).legato_row_sums
    except (BuildFailed, OSError) as error:
        logging.getLogger(__name__).warning("blocks are digested without compiled code, slower: %s", error)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.restype = None
    function.argtypes = [pointer] * 9 + [number] * 2 + [pointer] * 2 + [number] * 3
    return function
