"""Connections to the workers that KV is sent to: a gRPC channel an address, a transport peer a life of a worker."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Mapping

import grpc

from kvtransfer.choose import in_common
from kvtransfer.transport import Peer, Transport
from legato.v1 import worker_pb2
from service import logs
from spec.errors import TransferFailed
from worker.link import Link

logger = logs.get(__name__)

SET_ASIDE_S = 30.0  # before a transport that did not get through to a worker is tried again


class Peers:
    """Owned by the process. A worker that restarts has a new epoch: it is connected anew, the old released."""

    def __init__(self, transports: Mapping[str, Transport], open_channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._transports = transports
        self._open_channel = open_channel
        self._channels: dict[str, tuple[str, grpc.aio.Channel]] = {}
        self._peers: dict[tuple[str, int, str], asyncio.Future[Peer]] = {}
        self._releasing: set[asyncio.Task[None]] = set()
        self._set_aside_until_s: dict[tuple[str, int, str], float] = {}
        self._links: dict[str, Link] = {}

    async def channel(self, consumer_id: str, address: str) -> grpc.aio.Channel:
        """One a worker: where it has moved to another address, the channel to the old one is closed."""
        known, channel = self._channels.get(consumer_id, ("", None))
        if known != address or channel is None:
            self._channels[consumer_id] = address, self._open_channel(address)
            if channel is not None:
                await channel.close()
        return self._channels[consumer_id][1]

    def link(self, consumer_id: str) -> Link:
        """What hand-overs to that worker share, whatever carries them."""
        return self._links.setdefault(consumer_id, Link())

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
        found = self._peers.get(key)
        if found is not None and found.done() and _is_unusable(found):
            self._drop(key)
        if key not in self._peers:
            self._drop_older(key[0], key[1])
            attempt = asyncio.to_thread(transport.connect, endpoint.address, endpoint.region)
            self._peers[key] = asyncio.ensure_future(attempt)
        return await asyncio.shield(self._peers[key])

    def _drop_older(self, consumer_id: str, epoch: int) -> None:
        """What was for an earlier life of the worker."""
        for known in [key for key in self._set_aside_until_s if key[0] == consumer_id and key[1] != epoch]:
            del self._set_aside_until_s[known]
        for known in [key for key in self._peers if key[0] == consumer_id and key[1] != epoch]:
            self._drop(known)

    def _drop(self, key: tuple[str, int, str]) -> None:
        task = asyncio.create_task(_release(self._peers.pop(key)))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def close(self) -> None:
        for key in list(self._peers):
            self._drop(key)
        if self._releasing:
            await asyncio.wait(self._releasing)
        for _, channel in self._channels.values():
            await channel.close()
        self._channels.clear()


async def _release(connecting: asyncio.Future[Peer]) -> None:
    """Also one that is still being connected. A peer that does not confirm keeps its memory out of use by itself."""
    with contextlib.suppress(TransferFailed, asyncio.CancelledError):
        peer = await connecting
        await asyncio.to_thread(peer.release)


def _is_unusable(future: asyncio.Future[Peer]) -> bool:
    return future.cancelled() or future.exception() is not None or not future.result().connected
