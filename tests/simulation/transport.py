"""One-sided writes between simulated processes, as kvtransfer/transport.py specifies them, and all that can go wrong.

A write lands piece by piece, some time after it was posted, in the owner's memory: also when its writer has failed it
or died meanwhile, until `release()` or the owner's `cut()` has returned. Some links are like memory that their writer
has mapped: a cut proves nothing while it lives and has not heard of it. Where a write lands is told to `landing`, which
knows whose memory it is by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from kvtransfer.pieces import check_memory, check_pieces
from kvtransfer.transport import QUIET_TIMEOUT_S, Peer, Piece, Region, Transfer, Transport
from spec.errors import TransferFailed
from tests.simulation.loop import Process
from tests.simulation.network import Network

MAPPED_SHARE = 0.3  # of links
LINGER_S = 20.0  # what a dead process had handed to its machine lands within this
LOST_S = 5.0  # a write that a partition holds up fails within this

Landing = Callable[["SimulatedTransport", "Write", Sequence[Piece]], None]


@dataclasses.dataclass(slots=True, eq=False)
class Write:
    """One post. `mark` is what `posting` knew of the memory it goes to."""

    peer: SimulatedPeer
    source: memoryview
    pieces: list[Piece]
    transfer: Transfer
    mark: Any = None
    fault: str = ""
    delay_s: float = 0.0  # that it lands later than it would
    is_over: bool = False  # nothing of it lands any more


class Fabric:
    """Of all transports of a world: who has which address, and how writes fare."""

    def __init__(self, network: Network, rng: random.Random) -> None:
        self.network = network
        self.rng = rng
        self.faults = 0.0  # the share of writes that go wrong
        self.is_digested = True  # all that lands: only then may it land wrong
        self.by_address: dict[bytes, SimulatedTransport] = {}
        self.links: dict[int, SimulatedPeer] = {}  # by which something may land
        self.posting: Callable[[SimulatedTransport, Write], Any] = lambda owner, write: None
        self.landing: Landing = lambda owner, write, pieces: None
        self.writes = 0
        self._awaited: list[tuple[Process, asyncio.Future[None]]] = []

    async def write_of(self, process: Process, within_s: float) -> None:
        """Until something of it may still land, or the time is up."""
        if self.writes_of(process):
            return
        awaited = (process, self.network.loop.create_future())
        self._awaited.append(awaited)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await awaited[1]
        self._awaited.remove(awaited)

    def posted(self, process: Process) -> None:
        self.writes += 1
        for writer, news in self._awaited:
            if writer is process and not news.done():
                news.set_result(None)

    def writes_of(self, process: Process) -> list[Write]:
        """That may still land."""
        transports = [each for each in self.by_address.values() if each.process is process]
        peers = [peer for transport in transports for peer in transport.peers]
        return [write for peer in peers for write in peer.writes if not write.is_over]

    def crash(self, process: Process) -> None:
        for write in self.writes_of(process):
            if write.peer.is_mapped or self.rng.random() < 0.3:
                write.is_over = True
            else:
                write.delay_s = self.rng.random() * self.rng.choice((0.5, LINGER_S))
        for address in [address for address, each in self.by_address.items() if each.process is process]:
            del self.by_address[address]


class SimulatedTransport(Transport):
    name = "simulated"
    detail = "within a simulated world"

    def __init__(self, fabric: Fabric, process: Process) -> None:
        self.fabric = fabric
        self.process = process
        self.address = b"%s/%d" % (process.name.encode(), len(fabric.by_address) + fabric.rng.getrandbits(40))
        self.regions: dict[bytes, SimulatedRegion] = {}
        self.peers: dict[SimulatedPeer, None] = {}
        self.written_bytes = 0
        fabric.by_address[self.address] = self

    def register(self, nbytes: int, memory: memoryview | None = None) -> Region:
        check_memory(nbytes, memory)
        region = SimulatedRegion(self, memoryview(bytearray(nbytes)) if memory is None else memory.cast("B"))
        self.regions[region.descriptor] = region
        return region

    def connect(self, address: bytes, descriptor: bytes, timeout_s: float = 5.0) -> Any:
        """A future of the Peer: it takes virtual time."""
        return self.fabric.network.loop.create_task(self._connect(address, descriptor, timeout_s))

    async def _connect(self, address: bytes, descriptor: bytes, timeout_s: float) -> SimulatedPeer:
        owner = await self._reach(address, timeout_s)
        region = owner.regions.get(descriptor) if owner is not None else None
        if owner is None or region is None:
            raise TransferFailed("no such region is there")
        peer = SimulatedPeer(self, owner, region)
        self.peers[peer] = None
        return peer

    async def _reach(self, address: bytes, timeout_s: float) -> SimulatedTransport | None:
        """The owner, once it has answered; None: it is dead. Raises TransferFailed when it does not answer."""
        network = self.fabric.network
        host = address.rpartition(b"/")[0].decode()
        until_s = network.loop.time() + timeout_s
        while True:
            await asyncio.sleep(network.delay_s(self.process.name, host) + network.delay_s(host, self.process.name))
            owner = self.fabric.by_address.get(address)
            blocked = network.is_blocked(self.process.name, host)
            if not blocked and (owner is None or not owner.process.is_stopped):
                return owner
            if network.loop.time() >= until_s:
                raise TransferFailed(f"{host} does not answer")
            await asyncio.sleep(0.2)

    def has_link(self, link_id: int) -> bool:
        peer = self.fabric.links.get(link_id)
        return peer is not None and peer.owner is self and not peer.is_cut

    def cut(self, link_id: int) -> None:
        peer = self.fabric.links.get(link_id)
        if peer is not None:
            peer.was_cut()

    def close(self) -> None:
        """Its process ends, and with it all of this."""

    def counts(self) -> dict[str, int]:
        transfers = sum(not write.transfer.done() for peer in self.peers for write in peer.writes)
        return {
            "regions": len(self.regions),
            "peers": len(self.peers),
            "transfers": transfers,
            "written_bytes": self.written_bytes,
        }


class SimulatedRegion(Region):
    def __init__(self, transport: SimulatedTransport, buffer: memoryview) -> None:
        self.buffer = buffer
        self.descriptor = transport.fabric.rng.randbytes(8)
        self._transport = transport

    def release(self) -> None:
        self._transport.regions.pop(self.descriptor, None)


class SimulatedPeer(Peer):
    def __init__(self, transport: SimulatedTransport, owner: SimulatedTransport, target: SimulatedRegion) -> None:
        fabric = transport.fabric
        self.connected = True
        self.link_id = fabric.rng.getrandbits(64)
        self.is_mapped = fabric.rng.random() < MAPPED_SHARE
        self.is_cut = False
        assert self.link_id not in fabric.links
        fabric.links[self.link_id] = self
        self.owner = owner
        self.target = target
        self.writes: list[Write] = []  # that may still land
        self._transport = transport

    def post(self, source: Region, pieces: Sequence[Piece]) -> Transfer:
        check_pieces(pieces, source.buffer.nbytes, self.target.buffer.nbytes)
        if not self.connected:
            raise TransferFailed("the peer is lost")
        fabric = self._transport.fabric
        network, rng = fabric.network, fabric.rng
        fabric.posted(self._transport.process)
        transfer = Transfer()
        transfer.set_running_or_notify_cancel()
        write = Write(self, source.buffer, list(pieces), transfer)
        if fabric.faults and rng.random() < fabric.faults:
            spoilt = ("truncate", "corrupt") if fabric.is_digested else ()
            write.fault = rng.choice(("fail", *spoilt, "late", "late", "lose the peer"))
        if self.is_cut and not self.is_mapped:  # and it has not heard of that
            write.is_over = True
            network.loop.call_later(
                network.delay_s(self._transport.process.name, self.owner.process.name), self._fail, write
            )
            return transfer
        write.mark = fabric.posting(self.owner, write)
        self.writes = [earlier for earlier in self.writes if not earlier.is_over]
        self.writes.append(write)
        took_s = network.delay_s(self._transport.process.name, self.owner.process.name) * 4
        if write.fault == "late":
            took_s += rng.choice((rng.uniform(0.0, 2.0), rng.uniform(0.0, 15.0)))
        half = len(write.pieces) // 2
        if write.fault in ("fail", "lose the peer"):
            network.loop.call_later(took_s * rng.random(), self._fail, write)
        network.loop.call_later(took_s * 0.7, self._land, write, write.pieces[:half], False, context=network_context)
        network.loop.call_later(took_s, self._land, write, write.pieces[half:], True, context=network_context)
        return transfer

    def _fail(self, write: Write) -> None:
        """What is on its way may land for all that."""
        if write.fault == "lose the peer":
            self.connected = False
        if not write.transfer.done():
            write.transfer.set_exception(TransferFailed("the link broke"))

    def was_cut(self) -> None:
        """Raises as Transport.cut() does. The writer hears of it as soon as it can."""
        self.is_cut = True
        network, here, there = self._transport.fabric.network, self._transport.process, self.owner.process
        network.loop.call_later(
            network.delay_s(there.name, here.name), self._lost, list(self.writes), context=here.context
        )
        if self.is_mapped and here.is_alive:
            raise TransferFailed("the writer has this memory mapped, and lives")
        self._end()

    def _lost(self, writes: Sequence[Write]) -> None:
        self.connected = False
        for write in (*writes, *self.writes):
            self._fail(write)
        self._end()

    def _end(self) -> None:
        for write in self.writes:
            write.is_over = True
        self.writes.clear()
        self._transport.fabric.links.pop(self.link_id, None)

    def _land(self, write: Write, pieces: Sequence[Piece], is_last: bool) -> None:
        """In nobody's process: bytes that are on their way need neither."""
        network, here, there = self._transport.fabric.network, self._transport.process, self.owner.process
        if write.delay_s and not write.is_over:
            delay_s, write.delay_s = write.delay_s, 0.0
            network.loop.call_later(delay_s, self._land, write, pieces, is_last, context=network_context)
            return
        if write.is_over or not there.is_alive:
            write.is_over = True
            if not there.is_alive:
                network.loop.call_soon(self._fail, write, context=here.context)
            return
        if network.is_blocked(here.name, there.name):
            network.hold(here.name, there.name, lambda: self._land(write, pieces, is_last))
            network.loop.call_later(LOST_S * network.rng.random(), self._held_up, write, context=here.context)
            return
        if write.fault == "truncate" and is_last:
            pieces = []
        self._transport.fabric.landing(self.owner, write, pieces)
        target = self.target.buffer
        for source_offset, target_offset, nbytes in pieces:
            target[target_offset : target_offset + nbytes] = write.source[source_offset : source_offset + nbytes]
        if write.fault == "corrupt" and is_last:
            target[pieces[0].target_offset] ^= 0x10
        if is_last:
            write.is_over = True
            network.loop.call_later(network.delay_s(there.name, here.name), self._done, write, context=here.context)

    def _held_up(self, write: Write) -> None:
        if not write.is_over:
            self._fail(write)

    def _done(self, write: Write) -> None:
        if not write.transfer.done():
            self._transport.written_bytes += sum(piece.nbytes for piece in write.pieces)
            write.transfer.set_result(None)

    def release(self) -> Any:
        """A future: it takes virtual time, until the owner has answered, or is dead."""
        self.connected = False
        for write in self.writes:
            self._fail(write)
        return self._transport.fabric.network.loop.create_task(self._release())

    async def _release(self) -> None:
        await self._transport._reach(self.owner.address, QUIET_TIMEOUT_S)
        self._end()
        self._transport.peers.pop(self, None)


network_context = Process("the fabric").context
