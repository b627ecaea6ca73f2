"""Connections to decode workers: one gRPC channel an address, one transport peer a worker's life (its epoch)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

import grpc
from kvtransfer.choose import choose

from kvtransfer.transport import Peer, Transport
from legato.v1 import worker_pb2
from spec.errors import TransferFailed


class Peers:
    """Owned by the process. A decode worker that restarts has a new epoch: it is connected anew, the old released."""

    def __init__(self, transports: Mapping[str, Transport], open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._transports = transports
        self._open_channel = open_channel
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._peers: dict[tuple[str, int, str], asyncio.Future[Peer]] = {}

    def channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = self._open_channel(address)
        return self._channels[address]

    async def connect(
        self, consumer_id: str, epoch: int, endpoints: Iterable[worker_pb2.TransportEndpoint]
    ) -> tuple[str, Peer]:
        """The best transport that both have, connected; two calls at once share one attempt.

        Raises TransferFailed when there is none or the peer does not answer."""
        by_name = {endpoint.name: endpoint for endpoint in endpoints}
        transport = choose(list(self._transports.values()), list(by_name))
        if transport is None:
            raise TransferFailed(
                f"no transport in common with {consumer_id}: here {sorted(self._transports)}, there {sorted(by_name)}"
            )
        key = (consumer_id, epoch, transport.name)
        if key in self._peers and self._peers[key].done() and _is_unusable(self._peers[key]):
            del self._peers[key]
        if key not in self._peers:
            await self._release_older(consumer_id, epoch)
            endpoint = by_name[transport.name]
            self._peers[key] = asyncio.ensure_future(
                asyncio.to_thread(transport.connect, endpoint.address, endpoint.region)
            )
        return transport.name, await asyncio.shield(self._peers[key])

    async def _release_older(self, consumer_id: str, epoch: int) -> None:
        for key in [key for key in self._peers if key[0] == consumer_id and key[1] != epoch]:
            future = self._peers.pop(key)
            if future.done() and future.exception() is None:
                await asyncio.to_thread(future.result().release)

    async def close(self) -> None:
        for future in self._peers.values():
            if future.done() and future.exception() is None:
                await asyncio.to_thread(future.result().release)
        self._peers.clear()
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()


def _is_unusable(future: asyncio.Future[Peer]) -> bool:
    return future.cancelled() or future.exception() is not None or not future.result().connected
