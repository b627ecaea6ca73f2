"""The KV memory of all ranks of a worker: where each rank's part of the one region lies.

    |<------------------------- one mapping, registered with every transport ------------------------->|
    | rank 0: num_blocks · its block_bytes | to the next page | rank 1: num_blocks · its block_bytes | ... | probe |

The last bytes mean nothing: other workers write there to measure the link, and this one reads there when it measures.

Of ranks in several processes it is a file without a name (memfd), which ranks of the host open by rank 0's descriptor
of it: it goes with the last process that has it, however that one ends.
"""

from __future__ import annotations

import itertools
import mmap
import os
import sys
from collections.abc import Sequence

import torch

from engine.kv_memory import TORCH_DTYPES
from kvtransfer.probing import PROBE_BYTES
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout


class RankMemories:
    """Where each rank's part of the region lies. Owned by rank 0 while the worker is built; views stay good after."""

    def __init__(self, layouts: Sequence[KVLayout], num_blocks: int, *, shared: bool) -> None:
        """`shared`: other processes take their parts of it by `path`; raises InvalidConfiguration where none can."""
        self.layouts, self.num_blocks = layouts, num_blocks
        self.sizes = [num_blocks * layout.block_bytes for layout in layouts]
        bounds = [0, *itertools.accumulate(-(-size // mmap.PAGESIZE) * mmap.PAGESIZE for size in self.sizes)]
        self.offsets, self.probe_offset, self.nbytes = bounds[:-1], bounds[-1], bounds[-1] + PROBE_BYTES
        self.path = ""
        self.whole: memoryview | None = None
        self._descriptor: int | None = None
        if shared:
            if sys.platform != "linux":
                raise InvalidConfiguration("a worker of several ranks shares memory as Linux alone does it")
            self._descriptor = os.memfd_create("legato-kv", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, self.nbytes)
            self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
            self.whole = memoryview(mmap.mmap(self._descriptor, self.nbytes))

    def part(self, rank: int) -> memoryview:
        assert self.whole is not None, "no transport has allocated it yet"
        return kv_slice(self.whole, self.offsets[rank], self.sizes[rank])

    def landing(self, rank: int) -> torch.Tensor:
        return landing_of(self.part(rank), self.layouts[rank], self.num_blocks)

    def close(self) -> None:
        """Nobody opens it by its path any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def kv_slice(mapped: mmap.mmap | memoryview, offset_bytes: int, nbytes: int) -> memoryview:
    return memoryview(mapped)[offset_bytes : offset_bytes + nbytes]


def landing_of(own: memoryview, layout: KVLayout, num_blocks: int) -> torch.Tensor:
    """A rank's part of the region as [num_blocks, layers, planes, heads, block_tokens, row]."""
    return torch.frombuffer(own, dtype=TORCH_DTYPES[layout.dtype]).view(layout.shape(num_blocks))


def copy_blocks(
    landing: torch.Tensor, memory: torch.Tensor, block_ids: Sequence[int], layers: range, to_device: bool
) -> None:
    """Between a rank's part of the region and the memory of its GPU, both as landing_of() shapes them; of `layers`
    as the rank counts them. Beside the steps: on a stream of its own, which waits for none of their kernels."""
    index, device = torch.tensor(list(block_ids)), memory.device
    own = slice(layers.start, layers.stop)
    with torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        if to_device:
            memory[index.to(device), own] = landing[index, own].to(device)
            torch.cuda.current_stream(device).synchronize()
        else:
            landing[index, own] = memory[index.to(device), own].cpu()
