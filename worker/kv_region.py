"""The KV memory of a worker's ranks: one region a host, in which each of its ranks has a part.

    |<--------------- one mapping of a host's keeper, registered with every transport there --------------->|
    | rank 0: num_blocks · its block_bytes | to the next page | rank 1: num_blocks · its block_bytes | ... | probe |

The last bytes mean nothing: other workers write there to measure the link, and this one reads there when it measures.

The keeper of a host is the lowest of its ranks; rank 0 keeps its own host's. Of ranks in several processes the region
is a file without a name (memfd), which ranks of the host open by the keeper's descriptor of it: it goes with the last
process that has it, however that one ends.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.kv_memory import TORCH_DTYPES
from kvtransfer.probing import PROBE_BYTES
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout


class KVPlaces:
    """Where each rank's KV memory lies. Pure."""

    def __init__(self, layouts: Sequence[KVLayout], num_blocks: int, hosts: Sequence[int]) -> None:
        """`layouts` and `hosts` by rank; hosts are numbered from 0 on."""
        self.layouts, self.num_blocks, self.hosts = layouts, num_blocks, hosts
        self.sizes = [num_blocks * layout.block_bytes for layout in layouts]
        self.offsets: list[int] = []  # within the region of the rank's host
        self.probe_offsets = [0] * (max(hosts) + 1)  # by host: behind the ranks that are placed
        for host, size in zip(hosts, self.sizes, strict=True):
            self.offsets.append(self.probe_offsets[host])
            self.probe_offsets[host] += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.region_bytes = [offset + PROBE_BYTES for offset in self.probe_offsets]  # by host


class HostRegion:
    """Of this process's host. Owned by its keeper while the worker is built; views stay good after."""

    def __init__(self, nbytes: int, *, shared: bool) -> None:
        """`shared`: other processes take their parts of it by `path`; raises InvalidConfiguration where none can."""
        self.nbytes = nbytes
        self.path = ""
        self.whole: memoryview | None = None  # None: no transport has allocated it yet
        self._descriptor: int | None = None
        if shared:
            if sys.platform != "linux":
                raise InvalidConfiguration("a worker of several ranks shares memory as Linux alone does it")
            self._descriptor = os.memfd_create("legato-kv", os.MFD_CLOEXEC)
            os.ftruncate(self._descriptor, nbytes)
            self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
            self.whole = memoryview(mmap.mmap(self._descriptor, nbytes))

    def part(self, places: KVPlaces, rank: int) -> memoryview:
        """Of a rank on this host."""
        assert self.whole is not None
        return kv_slice(self.whole, places.offsets[rank], places.sizes[rank])

    def landing(self, places: KVPlaces, rank: int) -> torch.Tensor:
        return landing_of(self.part(places, rank), places.layouts[rank], places.num_blocks)

    def close(self) -> None:
        """Nobody opens it by its path any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def map_file(path: str) -> mmap.mmap:
    """Raises InvalidConfiguration where another process's memory cannot be opened."""
    try:
        with Path(path).open("r+b") as file:
            return mmap.mmap(file.fileno(), 0)
    except OSError as error:
        raise InvalidConfiguration(f"the host's KV memory cannot be opened ({error.strerror}): {path}") from None


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
