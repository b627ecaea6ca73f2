"""The disk tier: a file a block, in a folder that one process has to itself.

    disk_folder/0/lock        held (flock) by the process whose folder it is; names what its files are of
    disk_folder/0/HASH        header, then the content; written whole under another name, and renamed
    disk_folder/1/...         another worker of this host

The header says format, model and layout (`owner`), prefix hash, size, and the XXH3-128 of all of that and the content.
Nothing is synced: what a crash of the host left half written is found wrong when it is read. What is wrong is removed,
counted, and never handed out. Files of other names are somebody else's, and so are folders that hold something and
whose lock names no owner: they are left as they are.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
from pathlib import Path

import torch
import xxhash

from scheduler.tiers import TierIndex
from service import logs
from spec.errors import InvalidConfiguration

logger = logs.get(__name__)

MAGIC = b"LEGATOKV"
VERSION = 1
_FIELDS = struct.Struct("<8sI32s32sQ")  # magic, version, owner, prefix hash, bytes of the content
_CHECKSUM_BYTES = 16
HEADER_BYTES = _FIELDS.size + _CHECKSUM_BYTES
_LOCK, _UNFINISHED = "lock", ".unfinished"


class DiskTier:
    """At most `capacity_bytes` of files, headers included. `owner`: see worker/tiers.py."""

    name = "disk"

    def __init__(self, folder: str, capacity_bytes: int, owner: bytes) -> None:
        """Takes over what an earlier process of the same owner has left. Raises InvalidConfiguration where the folder
        cannot be used."""
        self.dropped = 0
        self._owner = owner
        self._index = TierIndex(capacity_bytes)
        self._guard = threading.Lock()
        self._is_failing = False
        try:
            self._folder, self._lock_descriptor = _claim(Path(folder), owner)
            self._find_files()
        except OSError as error:
            raise InvalidConfiguration(f"kv_tiers.disk_folder {folder} cannot be used: {error.strerror}") from None
        logger.info("%d KV blocks, %.1f MiB, are in %s", len(self._index), self._index.used_bytes / 2**20, self._folder)

    def _find_files(self) -> None:
        found: list[tuple[float, bytes, int]] = []
        for entry in os.scandir(self._folder):
            content_hash = _hash_of(entry.name.removesuffix(_UNFINISHED))
            if content_hash is None or not entry.is_file(follow_symlinks=False):
                continue
            if entry.name.endswith(_UNFINISHED):
                os.unlink(entry.path)
                continue
            status = entry.stat()
            if self._is_ours(Path(entry.path), content_hash, status.st_size):
                found.append((status.st_mtime, content_hash, status.st_size))
            else:
                os.unlink(entry.path)
                self.dropped += 1
        for _, content_hash, num_bytes in sorted(found):
            if num_bytes > self._index.capacity_bytes:
                self._path(content_hash).unlink()
                continue
            self._make_room(num_bytes)
            self._index.admit(content_hash, num_bytes)

    def _is_ours(self, path: Path, content_hash: bytes, num_bytes: int) -> bool:
        """Its content is looked at when it is read."""
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
        return len(header) == HEADER_BYTES and header[: _FIELDS.size] == self._fields(
            content_hash, num_bytes - HEADER_BYTES
        )

    def _fields(self, content_hash: bytes, content_bytes: int) -> bytes:
        return _FIELDS.pack(MAGIC, VERSION, self._owner, content_hash, content_bytes)

    def _make_room(self, num_bytes: int) -> None:
        """Raises OSError where a file does not go: it stays counted."""
        with self._guard:
            leaving = self._index.in_the_way_of(num_bytes)
        for content_hash in leaving:
            self._path(content_hash).unlink(missing_ok=True)
            with self._guard:
                self._index.drop(content_hash)

    def _path(self, content_hash: bytes) -> Path:
        return self._folder / content_hash.hex()

    def use(self, content_hash: bytes) -> bool:
        with self._guard:
            return self._index.use(content_hash)

    def store(self, content_hash: bytes, content: torch.Tensor) -> bool:
        """As Tier.store(), by one thread at a time. A disk that takes no more is said in the log; the tier goes on."""
        data = content.numpy().data
        num_bytes = HEADER_BYTES + data.nbytes
        fields, path = self._fields(content_hash, data.nbytes), self._path(content_hash)
        with self._guard:
            if content_hash in self._index or num_bytes > self._index.capacity_bytes:
                return False
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            self._make_room(num_bytes)
            with unfinished.open("wb") as file:
                file.write(fields + _checksum(fields, data))
                file.write(data)
            unfinished.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            if not self._is_failing:
                logger.warning("KV blocks cannot be written to %s: %s", self._folder, error.strerror)
            self._is_failing = True
            return False
        self._is_failing = False
        with self._guard:
            self._index.admit(content_hash, num_bytes)
        return True

    def load(self, content_hash: bytes) -> torch.Tensor | None:
        """As Tier.load(). A file that is not what was written is removed and counted."""
        with self._guard:
            if content_hash not in self._index:
                return None
        path = self._path(content_hash)
        try:
            with path.open("rb") as file:
                header = file.read(HEADER_BYTES)
                data = bytearray(os.fstat(file.fileno()).st_size - len(header))
                is_whole = file.readinto(data) == len(data)
        except FileNotFoundError:  # evicted meanwhile
            with self._guard:
                self._index.drop(content_hash)
            return None
        except OSError as error:  # the file is there, and counts
            logger.warning("%s cannot be read: %s", path, error.strerror)
            return None
        fields = self._fields(content_hash, len(data))
        if is_whole and data and header == fields + _checksum(fields, memoryview(data)):
            return torch.frombuffer(data, dtype=torch.uint8)
        logger.warning("%s is not what was written, and is removed", path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # it counts, and is never handed out
            logger.warning("%s cannot be removed: %s", path, error.strerror)
            return None
        with self._guard:
            self._index.drop(content_hash)
            self.dropped += 1
        return None

    def close(self) -> None:
        """The files stay for the next one."""
        os.close(self._lock_descriptor)


def _checksum(fields: bytes, data: memoryview) -> bytes:
    hasher = xxhash.xxh3_128(fields)
    hasher.update(data)
    return hasher.digest()


def _hash_of(name: str) -> bytes | None:
    try:
        content_hash = bytes.fromhex(name)
    except ValueError:
        return None
    return content_hash if content_hash.hex() == name and len(content_hash) == 32 else None


def _claim(folder: Path, owner: bytes) -> tuple[Path, int]:
    """A folder in `folder` that no other process has: one with files of this owner, or of any, or a new one; and the
    descriptor whose lock makes it ours."""
    folder.mkdir(parents=True, exist_ok=True)
    for own_only in (True, False):
        number = 0
        while (mine := folder / str(number)).is_dir() or not own_only:
            mine.mkdir(exist_ok=True)
            descriptor = _locked(mine)
            if descriptor is not None:
                before = os.pread(descriptor, len(owner) + 1, 0)
                if before == owner or (not own_only and (len(before) == len(owner) or os.listdir(mine) == [_LOCK])):
                    os.pwrite(descriptor, owner, 0)
                    return mine, descriptor
                os.close(descriptor)
            number += 1
    raise AssertionError("there is always a next number")


def _locked(mine: Path) -> int | None:
    """None: it is another's, who has it now, or who never made a lock there."""
    names = os.listdir(mine)
    if names and _LOCK not in names:
        return None
    descriptor = os.open(mine / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if _is_locked(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
