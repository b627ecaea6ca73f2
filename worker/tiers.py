"""Where a worker keeps copies of its KV blocks beside the KV memory: the tiers.

    host    in this process' memory, until it ends
    disk    in files, which a later start of a worker of the same model and layout finds again (tier_files.py)

A content is all bytes of one block: of each rank of a group in order, as uint8 [bytes]. Tiers are thread-safe; what
goes in and out of the KV memory, and when, is worker/warming.py's.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from kvtransfer.routes import RankMemory
from scheduler.tiers import TierIndex
from service.config import KVTiersConfig
from worker.tier_files import DiskTier


class Tier(Protocol):
    name: str
    dropped: int  # contents that were found wrong, and are not here any more; only grows

    def use(self, content_hash: bytes) -> bool:
        """It is the last to go from here on. False: it is not here."""
        ...

    def store(self, content_hash: bytes, content: torch.Tensor) -> bool:
        """False: it is here already, or cannot be. The tensor is the tier's from now on: it is not written any more."""
        ...

    def load(self, content_hash: bytes) -> torch.Tensor | None:
        """Not to be written. None: it is not here (any more)."""
        ...

    def close(self) -> None: ...


class HostTier:
    name = "host"
    dropped = 0

    def __init__(self, capacity_bytes: int) -> None:
        self._index = TierIndex(capacity_bytes)
        self._contents: dict[bytes, torch.Tensor] = {}
        self._lock = threading.Lock()

    def use(self, content_hash: bytes) -> bool:
        with self._lock:
            return self._index.use(content_hash)

    def store(self, content_hash: bytes, content: torch.Tensor) -> bool:
        with self._lock:
            if content_hash in self._index:
                return False
            if (evicted := self._index.admit(content_hash, content.numel())) is None:
                return False
            for oldest in evicted:
                del self._contents[oldest]
            self._contents[content_hash] = content
        return True

    def load(self, content_hash: bytes) -> torch.Tensor | None:
        with self._lock:
            return self._contents.get(content_hash)

    def close(self) -> None:
        self._contents.clear()


def open_tiers(config: KVTiersConfig, model: str, ranks: Sequence[RankMemory]) -> tuple[Tier, ...]:
    """Fastest first; none where none is configured. Raises InvalidConfiguration for a folder that cannot be used."""
    tiers: list[Tier] = []
    if config.host_bytes:
        tiers.append(HostTier(int(config.host_bytes)))
    if config.disk_folder is not None:
        tiers.append(DiskTier(config.disk_folder, int(config.disk_bytes), owner_of(model, ranks)))
    return tuple(tiers)


def configured_tier(config: KVTiersConfig) -> str | None:
    """The key of one that open_tiers() opens."""
    if config.host_bytes:
        return "kv_tiers.host_bytes"
    return None if config.disk_folder is None else "kv_tiers.disk_folder"


def owner_of(model: str, ranks: Sequence[RankMemory]) -> bytes:
    """32 bytes: equal where contents of the same hash are the same bytes. `model` names its weights and dtype, `ranks`
    are those of one group; what they hold counts, not where their memory lies."""
    hasher = hashlib.blake2b(digest_size=32, person=b"legato-tiers")
    hasher.update(len(model).to_bytes(8, "little") + model.encode())
    for rank in ranks:
        layers, heads = rank.kv.layers, rank.kv.heads
        held = f"layers {layers.start}:{layers.stop} heads {heads.start}:{heads.stop}"
        hasher.update(f"{rank.kv.layout.layout_id} {held}\n".encode())
    return hasher.digest()
