"""Triton where it is installed, and modules that import without it (CPU installs, macOS).

A kernel is only ever run through its launcher's `launch`, which reaches for `triton` first: where Triton is missing,
that is the line that says so. Kernels run on the current CUDA device: a rank is a process, and its device is current.
"""

from __future__ import annotations

import functools
from typing import Any

__all__ = ["jit", "tl", "triton"]


class _Missing:
    def __getattr__(self, name: str) -> Any:
        raise ImportError("kernels on a GPU need triton, which is not installed: pip install 'legato[gpu]'")


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = _Missing()


def jit(kernel: Any = None, **options: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is missing."""
    if kernel is None:
        return functools.partial(jit, **options)
    return kernel if isinstance(triton, _Missing) else triton.jit(kernel, **options)
