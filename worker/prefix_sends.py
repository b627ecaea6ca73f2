"""The source end of a fetch: blocks of our prefix cache go to a worker that asks for them, without a sequence."""

from __future__ import annotations

import asyncio

from legato.v1 import worker_pb2
from legato.v1.common_pb2 import TransferStats
from service.messages import with_adapter
from spec.errors import TicketRefused, TransferFailed
from worker.core import Core
from worker.outgoing import ACCEPT_TIMEOUT_S, advance_in_pieces, sender_for, verified_ticket
from worker.peers import Peers
from worker.sender import Sender


class PrefixSends:
    """All that are under way, and those whose writes are not proven quiet yet. Owned by the process."""

    def __init__(self, core: Core, peers: Peers) -> None:
        self._core = core
        self._peers = peers
        self._sends: dict[str, asyncio.Event] = {}  # by the asker's reservation; set when it is quiet
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def under_way(self) -> int:
        return len(self._sends)

    async def send(self, request: worker_pb2.SendPrefixRequest) -> TransferStats:
        """Raises TicketRefused for a ticket that is not for this, TransferFailed where the prefix is not here."""
        core = self._core
        ticket = verified_ticket(core, request.reservation)
        if ticket.reservation_id in self._sends:
            raise TicketRefused("the prefix is on its way already")
        self._sends[ticket.reservation_id] = asyncio.Event()
        sender: Sender | None = None
        group, table = -1, tuple[int, ...]()
        try:
            group, table = self._hold(request)
            identity = with_adapter(core.record.identity, request.adapter)
            tokens = request.token_ids[: ticket.num_tokens]
            sender = await sender_for(core, self._peers, ticket, request.reservation, request.address, identity, tokens)
            await sender.open(ACCEPT_TIMEOUT_S)
            advance_in_pieces(core, sender, group, table, ticket)
            stats = await sender.finish(None)
            core.meter.handed_over(stats)
            return stats
        finally:
            if table:
                core.unhold(group, table)  # each piece on its way is held by itself
            task = asyncio.create_task(self._close(sender, ticket.reservation_id))  # nothing that cancels us cancels it
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _hold(self, request: worker_pb2.SendPrefixRequest) -> tuple[int, tuple[int, ...]]:
        """(Group, the blocks of all these tokens), held."""
        core = self._core
        hashes = core.scheduler.schedulers[0].prefix.hashes(request.token_ids, request.adapter)
        with core.loop.lock:
            for group, scheduler in enumerate(core.scheduler.schedulers):
                if hashes and scheduler.prefix.count(hashes) == len(hashes):
                    found = [block for content in hashes if (block := scheduler.pool.find(content)) is not None]
                    return group, scheduler.pool.hold(found)
        raise TransferFailed(f"{core.record.worker_id} does not hold this prefix")

    async def _close(self, sender: Sender | None, reservation_id: str) -> None:
        if sender is not None:
            await sender.close()
        self._sends.pop(reservation_id).set()

    async def confirm_quiet(self, reservation_id: str) -> None:
        if (closed := self._sends.get(reservation_id)) is not None:
            await closed.wait()

    async def close(self) -> None:
        """A write that is still not proven quiet goes with the process."""
        for task in self._closing:
            task.cancel()
