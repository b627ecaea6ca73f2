"""Connections to the workers that KV is sent to: a gRPC channel an address, and to each host of a life of a worker a
transport peer.

Two workers meet once (meeting.py): every transport that both have is measured, into memory of the owner that means
nothing, and hand-overs go by the best. Where they have not met yet, they go by the first in the configured order. What
connects and does not carry is taken only where no other gets through. To all hosts of a worker KV goes by the same
transport, and is there when the last of them has it: the best is the one that is best to the host it is slowest to.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import grpc

from kvtransfer.choose import in_common
from kvtransfer.probing import PROBE_BYTES, TYPICAL_BYTES, Measured, measure, ranked
from kvtransfer.transport import Peer, Region, Transport
from legato.v1 import worker_pb2
from service import logs
from spec.errors import TransferFailed
from worker.link import Link

logger = logs.get(__name__)

SET_ASIDE_S = 30.0  # before a transport that did not get through to a worker is tried again

_Key = tuple[str, int, str, int]  # worker, epoch, transport, host of the worker
_Endpoints = dict[int, worker_pb2.TransportEndpoint]  # of one transport, by host


class Met(NamedTuple):
    """One host. `measured` is None where the owner has no memory to measure in."""

    host: int
    transport: str
    runs_over: str
    measured: Measured | None


class Peers:
    """Owned by the process. A worker that restarts has a new epoch: it is connected anew, the old released.

    `regions`: this worker's KV memory, whose last PROBE_BYTES are free to be read."""

    def __init__(
        self,
        transports: Mapping[str, Transport],
        open_channel: Callable[[str], grpc.aio.Channel],
        regions: Mapping[str, Region],
    ) -> None:
        self._transports = transports
        self._open_channel = open_channel
        self._regions = regions
        self._channels: dict[str, tuple[str, grpc.aio.Channel]] = {}
        self._peers: dict[_Key, asyncio.Future[Peer]] = {}
        self._releasing: set[asyncio.Task[None]] = set()
        self._set_aside_until_s: dict[_Key, float] = {}
        self._links: weakref.WeakValueDictionary[tuple[str, int], Link] = weakref.WeakValueDictionary()  # while in use
        self._met: dict[_Key, Met] = {}
        self._carries_nothing: set[_Key] = set()  # it connects, but the last measurement failed
        self._taken: set[_Key] = set()  # by hand-overs

    async def channel(self, consumer_id: str, address: str) -> grpc.aio.Channel:
        """One a worker: where it has moved to another address, the channel to the old one is closed."""
        known, channel = self._channels.get(consumer_id, ("", None))
        if known != address or channel is None:
            self._channels[consumer_id] = address, self._open_channel(address)
            if channel is not None:
                await channel.close()
        return self._channels[consumer_id][1]

    def link(self, consumer_id: str, host: int) -> Link:
        """What hand-overs to that host of the worker share, whatever carries them."""
        link = self._links.get((consumer_id, host))
        if link is None:
            link = self._links[consumer_id, host] = Link()
        return link

    async def connect(
        self, consumer_id: str, epoch: int, endpoints: Iterable[worker_pb2.TransportEndpoint]
    ) -> tuple[str, dict[int, Peer]]:
        """To each host that has an endpoint, by the best transport that both have and that gets through to all; one
        that did not is left aside for a while.

        Raises TransferFailed when there is none."""
        by_name = _by_name(endpoints)
        why = f"here {', '.join(self._transports)}; there {', '.join(by_name)}"
        for name in self._best_first(consumer_id, epoch, by_name):
            keys = {(consumer_id, epoch, name, host): endpoint for host, endpoint in by_name[name].items()}
            if any(self._set_aside_until_s.get(key, 0.0) > time.monotonic() for key in keys):
                continue
            try:
                peers = {key[3]: await self._connected(key, endpoint) for key, endpoint in keys.items()}
            except TransferFailed as error:
                why = f"{name}: {error.message}"
            else:
                self._taken.update(keys)
                return name, peers
        raise TransferFailed(f"no transport gets through to {consumer_id} ({why})")

    async def meet(self, record: worker_pb2.WorkerRecord) -> list[Met]:
        """Connects to each host of that worker by each transport in common, measures, keeps the best and says which it
        is.

        Raises TransferFailed when none gets through."""
        worker_id, epoch = record.worker_id, record.epoch
        by_name = _by_name(record.endpoints)
        for name in self._best_first(worker_id, epoch, by_name):
            for host, endpoint in by_name[name].items():
                await self._meet((worker_id, epoch, name, host), endpoint)
        best, peers = await self.connect(worker_id, epoch, record.endpoints)
        for key in [key for key in self._peers if key[:2] == (worker_id, epoch) and key not in self._taken]:
            self._drop(key)
        keys = [(worker_id, epoch, best, host) for host in peers]
        return [self._met.get(key, Met(key[3], best, "unknown", None)) for key in keys]

    async def _meet(self, key: _Key, endpoint: worker_pb2.TransportEndpoint) -> None:
        with contextlib.suppress(TransferFailed):  # it is set aside
            peer = await self._connected(key, endpoint)
            try:
                measured = await asyncio.to_thread(self._measured, key[2], peer, endpoint.probe_offset)
            except TransferFailed as error:
                self._carries_nothing.add(key)
                self._met.pop(key, None)
                self._set_aside(key, error)
                if key not in self._taken and key in self._peers:
                    self._drop(key)
            else:
                self._carries_nothing.discard(key)
                self._set_aside_until_s.pop(key, None)
                self._met[key] = Met(key[3], key[2], peer.runs_over, measured)

    def is_connected(self, record: worker_pb2.WorkerRecord) -> bool:
        """To each of its hosts in this life of it, by some transport."""
        of_this = (record.worker_id, record.epoch)
        reached = {key[3] for key, peer in self._peers.items() if key[:2] == of_this and not _is_unusable(peer)}
        return reached >= {endpoint.host for endpoint in record.endpoints}

    def links(self) -> list[worker_pb2.PeerLink]:
        """What was measured, to each worker in its latest life."""
        return [
            worker_pb2.PeerLink(
                worker_id=key[0],
                transport=met.transport,
                runs_over=met.runs_over,
                bytes_per_s=met.measured.bytes_per_s if met.measured else 0.0,
                latency_s=met.measured.latency_s if met.measured else 0.0,
                taken=key in self._taken,
                host=met.host,
            )
            for key, met in sorted(self._met.items())
        ]

    def _set_aside(self, key: _Key, error: TransferFailed) -> None:
        self._set_aside_until_s[key] = time.monotonic() + SET_ASIDE_S
        host = f" (host {key[3]})" if key[3] else ""
        logger.warning("%s%s is not reached by %s: %s", key[0], host, key[2], error)

    def _best_first(self, worker_id: str, epoch: int, by_name: Mapping[str, _Endpoints]) -> list[str]:
        """Of the transports that both have, there on every host."""
        hosts = {host for endpoints in by_name.values() for host in endpoints}
        everywhere = [name for name, endpoints in by_name.items() if endpoints.keys() == hosts]
        both = [transport.name for transport in in_common(list(self._transports.values()), everywhere)]
        measured: dict[str, Measured] = {}
        for name in both:
            met = [self._met.get((worker_id, epoch, name, host)) for host in hosts]
            found = [each.measured for each in met if each is not None and each.measured is not None]
            if len(found) == len(hosts):
                measured[name] = max(found, key=lambda each: each.time_s(TYPICAL_BYTES))
        failed = {key[2] for key in self._carries_nothing if key[:2] == (worker_id, epoch)}
        return ranked(both, measured, failed)

    def _measured(self, name: str, peer: Peer, probe_offset: int) -> Measured | None:
        if not probe_offset:
            return None
        source = self._regions[name]
        return measure(peer, source, source.buffer.nbytes - PROBE_BYTES, probe_offset)

    async def _connected(self, key: _Key, endpoint: worker_pb2.TransportEndpoint) -> Peer:
        """Two calls at once share one attempt. Raises TransferFailed; then it is set aside."""
        found = self._peers.get(key)
        if found is not None and found.done() and _is_unusable(found):
            self._drop(key)
        if key not in self._peers:
            self._drop_older(key[0], key[1])
            attempt = asyncio.to_thread(self._transports[key[2]].connect, endpoint.address, endpoint.region)
            self._peers[key] = asyncio.ensure_future(attempt)
        try:
            return await asyncio.shield(self._peers[key])
        except TransferFailed as error:
            self._set_aside(key, error)
            raise

    def known(self) -> set[str]:
        """Workers for which something is kept."""
        return {key[0] for known in (self._peers, self._met, self._set_aside_until_s) for key in known} | {
            *self._channels
        }

    async def forget(self, worker_id: str) -> None:
        """What is kept for a worker that is gone for good, unless a hand-over has to do with it yet."""
        if any(user == worker_id for user, _ in self._links):
            return
        self._drop_older(worker_id, math.inf)
        if worker_id in self._channels:
            _, channel = self._channels.pop(worker_id)
            await channel.close()

    def _drop_older(self, consumer_id: str, epoch: float) -> None:
        """What was for an earlier life of the worker."""
        for known in (self._set_aside_until_s, self._met):
            for key in [key for key in known if key[0] == consumer_id and key[1] < epoch]:
                del known[key]
        self._carries_nothing = {key for key in self._carries_nothing if key[0] != consumer_id or key[1] >= epoch}
        for key in [key for key in self._peers if key[0] == consumer_id and key[1] < epoch]:
            self._drop(key)

    def _drop(self, key: _Key) -> None:
        self._taken.discard(key)
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
    """Also where it is not connected yet."""
    if not future.done() or future.cancelled() or future.exception() is not None:
        return True
    return not future.result().connected


def _by_name(endpoints: Iterable[worker_pb2.TransportEndpoint]) -> dict[str, _Endpoints]:
    found: dict[str, _Endpoints] = {}
    for endpoint in endpoints:
        found.setdefault(endpoint.name, {})[endpoint.host] = endpoint
    return found
