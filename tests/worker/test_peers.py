"""How a prefill worker reaches decode workers: the best transport that gets through, one connection a worker's life."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import worker.peers
from kvtransfer.memory import MemoryTransport
from kvtransfer.probing import PROBE_BYTES, Measured
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Peer, Region, Transport
from legato.v1.worker_pb2 import TransportEndpoint, WorkerRecord
from service.channel import channel
from spec.errors import TransferFailed
from worker.peers import Peers

KV_BYTES = 4096


class Remote:
    """A decode worker's end: one region, offered through two transports."""

    def __init__(self) -> None:
        self.transports: dict[str, Transport] = {"memory": MemoryTransport({}), "sockets": SocketsTransport()}
        nbytes = KV_BYTES + PROBE_BYTES
        self.regions: dict[str, Region] = {name: each.register(nbytes) for name, each in self.transports.items()}

    def endpoints(self, *broken: str, host: int = 0) -> list[TransportEndpoint]:
        return [
            TransportEndpoint(
                name=name,
                address=b"nobody is here" if name in broken else transport.address,
                region=self.regions[name].descriptor,
                probe_offset=KV_BYTES,
                host=host,
            )
            for name, transport in self.transports.items()
        ]


@pytest.fixture
def remote() -> Iterator[Remote]:
    made = Remote()
    yield made
    for transport in made.transports.values():
        transport.close()


@pytest.fixture
def ours() -> Iterator[dict[str, Transport]]:
    made: dict[str, Transport] = {"memory": MemoryTransport({}), "sockets": SocketsTransport()}
    yield made
    for transport in made.values():
        transport.close()


@pytest.fixture
def regions(ours: dict[str, Transport]) -> dict[str, Region]:
    return {name: transport.register(KV_BYTES + PROBE_BYTES) for name, transport in ours.items()}


async def connected(peers: Peers, endpoints: list[TransportEndpoint], epoch: int = 1) -> tuple[str, list[Peer]]:
    """By host."""
    name, found = await peers.connect("decode-0", epoch, endpoints)
    return name, [found[host] for host in sorted(found)]


async def test_the_best_is_taken_and_kept(
    remote: Remote, ours: dict[str, Transport], regions: dict[str, Region]
) -> None:
    peers = Peers(ours, channel, regions)
    name, (peer,) = await connected(peers, remote.endpoints())
    assert (name, peer.connected) == ("memory", True)
    assert await connected(peers, remote.endpoints()) == (name, [peer])
    await peers.close()
    assert not peer.connected


async def test_one_that_does_not_get_through_gives_way_to_the_next(
    remote: Remote, ours: dict[str, Transport], regions: dict[str, Region]
) -> None:
    peers = Peers(ours, channel, regions)
    for _ in range(2):  # the second time it is not even tried
        name, (peer,) = await connected(peers, remote.endpoints("memory"))
        assert (name, peer.connected) == ("sockets", True)
    with pytest.raises(TransferFailed, match="decode-1"):
        await peers.connect("decode-1", 1, remote.endpoints("memory", "sockets"))
    with pytest.raises(TransferFailed, match="here memory, sockets"):
        await peers.connect("decode-2", 1, [])
    await peers.close()
    assert sum(transport.counts()["peers"] for transport in ours.values()) == 0


async def test_a_worker_that_restarted_is_connected_anew(
    remote: Remote, ours: dict[str, Transport], regions: dict[str, Region]
) -> None:
    peers = Peers(ours, channel, regions)
    _, (before,) = await connected(peers, remote.endpoints())
    _, (after,) = await connected(peers, remote.endpoints(), epoch=2)
    assert not before.connected
    assert after.connected
    await peers.connect("decode-0", 1, remote.endpoints())
    assert after.connected, "by a ticket of its earlier life"
    assert (await connected(peers, remote.endpoints(), epoch=2))[1] == [after]
    await peers.close()


def record(remote: Remote, *broken: str, epoch: int = 1) -> WorkerRecord:
    return WorkerRecord(worker_id="decode-0", epoch=epoch, endpoints=remote.endpoints(*broken))


async def test_to_meet_is_to_measure_each_and_to_keep_the_best(
    remote: Remote, ours: dict[str, Transport], regions: dict[str, Region]
) -> None:
    peers = Peers(ours, channel, regions)
    (link,) = await peers.meet(record(remote))
    assert link.measured is not None
    assert link.measured.bytes_per_s > 0
    said = {each.transport: each for each in peers.links()}
    assert {name: each.runs_over for name, each in said.items()} == {
        "memory": "shared memory",
        "sockets": "unix socket",
    }
    assert [name for name, each in said.items() if each.taken] == [link.transport]
    assert peers.is_connected(record(remote))
    assert not peers.is_connected(record(remote, epoch=2))
    await peers.close()
    for region in remote.regions.values():
        assert bytes(region.buffer[:KV_BYTES]) == bytes(KV_BYTES), "no byte of KV is touched"


async def test_what_was_measured_decides_and_not_the_order_alone(
    remote: Remote, ours: dict[str, Transport], regions: dict[str, Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"shared memory": 1e9, "unix socket": 5e9}
    monkeypatch.setattr(worker.peers, "measure", lambda peer, *_: Measured(1e-5, rates[peer.runs_over]))
    peers = Peers(ours, channel, regions)
    _, (first,) = await connected(peers, remote.endpoints())
    assert (await peers.meet(record(remote)))[0].transport == "sockets"
    assert (await peers.connect("decode-0", 1, remote.endpoints()))[0] == "sockets"
    assert first.connected, "a hand-over may be under way on it"
    assert (await peers.meet(record(remote, "sockets", epoch=2)))[0].transport == "memory", "what cannot be measured"
    assert [each.transport for each in peers.links()] == ["memory"]
    await peers.close()


async def test_one_that_connects_and_carries_nothing_comes_last(
    remote: Remote, ours: dict[str, Transport], regions: dict[str, Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"shared memory"}

    def measure(peer: Peer, *_: object) -> Measured:
        if peer.runs_over in broken:
            raise TransferFailed("1 bytes did not land in 5.0 s")
        return Measured(1e-5, 1e9)

    monkeypatch.setattr(worker.peers, "measure", measure)
    peers = Peers(ours, channel, regions)
    assert (await peers.meet(record(remote)))[0].transport == "sockets"
    assert [each.transport for each in peers.links()] == ["sockets"]
    for _ in range(2):
        name, (peer,) = await connected(peers, remote.endpoints())
        assert name == "sockets"
        peer.release()  # as after a hand-over that ended badly
        peers._set_aside_until_s.clear()  # its time has come again
    assert (await peers.connect("decode-0", 1, remote.endpoints("sockets")))[0] == "memory", "better than none"
    broken.clear()
    assert (await peers.meet(record(remote)))[0].transport == "memory", "it was mended"
    broken.update({"shared memory", "unix socket"})
    other = WorkerRecord(worker_id="decode-1", epoch=1, endpoints=remote.endpoints())
    with pytest.raises(TransferFailed, match="no transport gets through"):
        await peers.meet(other)
    assert not peers.is_connected(other), "it will be met again"
    await peers.close()


async def test_a_link_is_shared_while_a_hand_over_holds_it_and_kept_no_longer(
    ours: dict[str, Transport], regions: dict[str, Region]
) -> None:
    peers = Peers(ours, channel, regions)
    first = peers.link("decode-0", 0)
    assert peers.link("decode-0", 0) is first
    assert peers.link("decode-0", 1) is not first
    assert peers.link("decode-1", 0) is not first
    del first
    gc.collect()
    assert not peers._links
    await peers.close()


async def test_to_all_hosts_of_a_worker_by_what_is_best_to_the_slowest(
    remote: Remote, ours: dict[str, Transport], regions: dict[str, Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    second, slow = Remote(), set[Peer]()
    rates = {"shared memory": 9e9, "unix socket": 5e9}
    monkeypatch.setattr(
        worker.peers,
        "measure",
        lambda peer, *_: Measured(1e-5, 1e9 if peer in slow else rates[peer.runs_over]),
    )
    both = [*remote.endpoints(), *second.endpoints(host=1)]
    peers = Peers(ours, channel, regions)
    try:
        name, (first, other) = await connected(peers, both)
        assert (name, first is other) == ("memory", False)
        slow.add(other)
        of_both = WorkerRecord(worker_id="decode-0", epoch=1, endpoints=both)
        assert [(met.host, met.transport) for met in await peers.meet(of_both)] == [(0, "sockets"), (1, "sockets")]
        assert {(link.host, link.transport) for link in peers.links() if link.taken} == {
            (host, name) for host in (0, 1) for name in ("memory", "sockets")
        }
        assert peers.is_connected(of_both)
        _, found = await connected(peers, both)
        for peer in (found[1], other):
            peer.release()
        assert not peers.is_connected(of_both), "the second host is not reached"
        with pytest.raises(TransferFailed, match="there memory, sockets"):
            await peers.connect("decode-1", 1, [*remote.endpoints()[:1], *second.endpoints(host=1)[1:]])
    finally:
        await peers.close()
        for transport in second.transports.values():
            transport.close()
