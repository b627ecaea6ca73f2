"""Tokens on their way to the routers: one message per step and router, not per request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from legato.v1 import worker_pb2
from spec.errors import WorkerLost


class Subscription:
    """One Subscribe call. A router that reconnects gets a new one; sequences stay with the one they came under."""

    def __init__(self, router_id: str) -> None:
        self.router_id = router_id
        self.sequence_ids: set[str] = set()
        self._outputs: asyncio.Queue[worker_pb2.StepOutput | None] = asyncio.Queue()

    def put(self, output: worker_pb2.StepOutput) -> None:
        self._outputs.put_nowait(output)

    def end(self) -> None:
        self._outputs.put_nowait(None)

    async def outputs(self) -> AsyncIterator[worker_pb2.StepOutput]:
        while (output := await self._outputs.get()) is not None:
            yield output


class Subscriptions:
    """Which router gets which sequence's tokens. Used in the event loop only."""

    def __init__(self) -> None:
        self._by_router: dict[str, Subscription] = {}
        self._by_sequence: dict[str, Subscription] = {}

    @property
    def attached(self) -> int:
        """Sequences whose tokens somebody waits for."""
        return len(self._by_sequence)

    @property
    def all(self) -> list[Subscription]:
        return list(self._by_router.values())

    def open(self, router_id: str) -> Subscription:
        if (older := self._by_router.get(router_id)) is not None:
            older.end()
        subscription = self._by_router[router_id] = Subscription(router_id)
        return subscription

    def close(self, subscription: Subscription) -> set[str]:
        """Returns the sequences that lose their reader."""
        if self._by_router.get(subscription.router_id) is subscription:
            del self._by_router[subscription.router_id]
        orphans = set(subscription.sequence_ids)
        for sequence_id in orphans:
            self._by_sequence.pop(sequence_id, None)
        subscription.sequence_ids.clear()
        return orphans

    def attach(self, router_id: str, sequence_id: str) -> None:
        """Raises WorkerLost when the router reads no tokens here: it is behind, and must subscribe first."""
        subscription = self._by_router.get(router_id)
        if subscription is None:
            raise WorkerLost(f"router {router_id!r} is not subscribed here")
        subscription.sequence_ids.add(sequence_id)
        self._by_sequence[sequence_id] = subscription

    def detach(self, sequence_id: str) -> None:
        if (subscription := self._by_sequence.pop(sequence_id, None)) is not None:
            subscription.sequence_ids.discard(sequence_id)

    def of(self, sequence_id: str) -> Subscription | None:
        return self._by_sequence.get(sequence_id)
