"""Columns in the order in which a weight has them (kernels/quantised.py): out[t, c] = x[t, order[c]], 0 for -1."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.library import library_for


def reference(x: Tensor, order: Tensor) -> Tensor:
    return F.pad(x, (0, 1))[:, order]  # -1 reads the column that was added


def ordered_columns(x: Tensor, order: Tensor) -> Tensor:
    """x: [T, K]; order: [C] int64, each in [-1, K). Returns [T, C] in x.dtype."""
    library = library_for(x)
    return reference(x, order) if library is None else library.ordered_columns(x, order)
