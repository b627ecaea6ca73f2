"""Who counts what is alive, for the peers of the transports: each transport does, for its own."""

from __future__ import annotations

import abc

from kvtransfer.transport import Transfer


class Ledger(abc.ABC):
    """From any thread."""

    @abc.abstractmethod
    def began(self, transfer: Transfer) -> None: ...

    @abc.abstractmethod
    def ended(self, transfer: Transfer, written_bytes: int) -> None: ...

    @abc.abstractmethod
    def forget(self, link_id: int) -> None:
        """That peer is released, and quiet."""
