"""How a writer comes by a pointer to a UCX region of another process, for kvtransfer/ucx.py.

libucp parses a key without looking, and computes a pointer from whatever address it is told. So the owner seals what it
says with a checksum, and the writer takes a pointer only into memory that unpacking this very key has mapped; without
one, pieces go as messages, which the owner puts where they belong.
"""

from __future__ import annotations

import ctypes
import hashlib
import hmac
from pathlib import Path

from kvtransfer import libucp
from legato.v1.transfer_pb2 import TransferFrame
from spec.errors import TransferFailed


def seal(answer: TransferFrame.Attached) -> None:
    answer.checksum = _checksum(answer)


def check(answer: TransferFrame.Attached) -> None:
    """Raises TransferFailed for an answer that is not as its owner sealed it."""
    if not hmac.compare_digest(_checksum(answer), answer.checksum):
        raise TransferFailed("the owner's remote key, address or size is damaged")


def map_region(library: libucp.LibUcp, endpoint: int, answer: TransferFrame.Attached) -> tuple[int, int]:
    """(remote key, where the region lies in this process), or (0, 0) when it is not shared with this process.

    The region stays mapped until the key is destroyed."""
    if not answer.remote_key:
        return 0, 0
    key, pointer = ctypes.c_void_p(), ctypes.c_void_p()
    before = _shared_mappings()
    if library.ucp_ep_rkey_unpack(endpoint, answer.remote_key, ctypes.byref(key)) != libucp.OK or key.value is None:
        return 0, 0
    if library.ucp_rkey_ptr(key, answer.base_address, ctypes.byref(pointer)) == libucp.OK:
        base = pointer.value or 0
        end = base + answer.region_bytes
        if any(start <= base and end <= stop for start, stop in _shared_mappings() - before):
            return key.value, base
    library.ucp_rkey_destroy(key)
    return 0, 0


def _checksum(answer: TransferFrame.Attached) -> bytes:
    sizes = answer.region_bytes.to_bytes(8, "little") + answer.base_address.to_bytes(8, "little")
    return hashlib.blake2b(sizes + answer.remote_key, digest_size=16).digest()


def _shared_mappings() -> set[tuple[int, int]]:
    """[start, stop) of each piece of address space here that is shared, readable and writable (Linux, proc(5))."""
    found = set()
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        extent, modes = line.split(maxsplit=2)[:2]
        if modes.startswith("rw") and modes.endswith("s"):
            start, _, stop = extent.partition("-")
            found.add((int(start, 16), int(stop, 16)))
    return found
