"""Whether a process that mapped our memory has let go of it, for kvtransfer/ucx.py.

A mapping cannot be taken back, and a process that is killed has no last word. So who asks for the key to map memory
holds a lock (flock(2)) on a file until it has let go of the memory, or thrown the key away. The kernel drops the lock
when the last descriptor of the file is closed; of a process that ends, however it ends, that is after its memory is
gone (Linux, do_exit(): exit_mm() before exit_files()). A child that a fork left with the memory has the descriptor,
too.

The file lies in /dev/shm: containers that can map each other's memory have that in common, though each may number its
processes by itself. Its name is gone as soon as the owner of the memory has opened it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import threading
from pathlib import Path

FOLDER = Path("/dev/shm")
_NAME = re.compile(r"legato-[0-9a-f]{24}")


class MappingLock:
    """Of who may map. `name` is what the owner is told; "": this host has no place for it, and nothing is mapped."""

    def __init__(self) -> None:
        self.name = f"legato-{secrets.token_hex(12)}"
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(FOLDER / self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.let_go()
            self.name = ""

    def forget_name(self) -> None:
        """The owner has opened it, or never will."""
        with contextlib.suppress(OSError):
            (FOLDER / self.name).unlink()

    def let_go(self) -> None:
        """Nothing is mapped (any more). Idempotent."""
        self.forget_name()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class WatchedLock:
    """Of the owner of the memory. Any thread may look."""

    def __init__(self, name: str) -> None:
        """`is_held` is False at once where there is no such lock, or nobody holds it: then the key is not for its
        writer."""
        self._descriptor: int | None = None
        self._looking = threading.Lock()
        if not _NAME.fullmatch(name):
            return
        with contextlib.suppress(OSError):
            self._descriptor = os.open(FOLDER / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            (FOLDER / name).unlink()

    @property
    def is_held(self) -> bool:
        """False: the memory is not mapped by that writer, and never will be again by this key."""
        with self._looking:
            if self._descriptor is None:
                return False
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            self._close()
            return False

    def close(self) -> None:
        with self._looking:
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
