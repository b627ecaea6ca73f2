"""Connections to decode workers: one gRPC channel an address, one transport peer a worker's life (its epoch)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping

import grpc

from kvtransfer.choose import in_common
from kvtransfer.transport import Peer, Transport
from legato.v1 import worker_pb2
from service import logs
from spec.errors import TransferFailed

logger = logs.get(__name__)

SET_ASIDE_S = 30.0  # before a transport that did not get through to a worker is tried again


class Peers:
    """Owned by the process. A decode worker that restarts has a new epoch: it is connected anew, the old released."""

    def __init__(self, transports: Mapping[str, Transport], open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._transports = transports
        self._open_channel = open_channel
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._peers: dict[tuple[str, int, str], asyncio.Future[Peer]] = {}
        self._set_aside_until_s: dict[tuple[str, int, str], float] = {}

    def channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = self._open_channel(address)
        return self._channels[address]

    async def connect(
        self, consumer_id: str, epoch: int, endpoints: Iterable[worker_pb2.TransportEndpoint]
    ) -> tuple[str, Peer]:
        """By the best transport that both have and that gets through; one that did not is left aside for a while.

        Raises TransferFailed when there is none."""
        by_name = {endpoint.name: endpoint for endpoint in endpoints}
        why = f"here {', '.join(self._transports)}; there {', '.join(by_name)}"
        for transport in in_common(list(self._transports.values()), list(by_name)):
            key = (consumer_id, epoch, transport.name)
            if self._set_aside_until_s.get(key, 0.0) > time.monotonic():
                continue
            try:
                return transport.name, await self._connected(key, transport, by_name[transport.name])
            except TransferFailed as error:
                self._set_aside_until_s[key] = time.monotonic() + SET_ASIDE_S
                why = f"{transport.name}: {error.message}"
                logger.warning("no connection to %s by %s", consumer_id, why)
        raise TransferFailed(f"no transport gets through to {consumer_id} ({why})")

    async def _connected(
        self, key: tuple[str, int, str], transport: Transport, endpoint: worker_pb2.TransportEndpoint
    ) -> Peer:
        """Two calls at once share one attempt."""
        if key in self._peers and self._peers[key].done() and _is_unusable(self._peers[key]):
            del self._peers[key]
        if key not in self._peers:
            await self._release_older(key[0], key[1])
            attempt = asyncio.to_thread(transport.connect, endpoint.address, endpoint.region)
            self._peers.setdefault(key, asyncio.ensure_future(attempt))
        return await asyncio.shield(self._peers[key])

    async def _release_older(self, consumer_id: str, epoch: int) -> None:
        for key in [key for key in self._set_aside_until_s if key[0] == consumer_id and key[1] != epoch]:
            del self._set_aside_until_s[key]
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
