"""How a prefill worker reaches decode workers: the best transport that gets through, one connection a worker's life."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kvtransfer.memory import MemoryTransport
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Region, Transport
from legato.v1.worker_pb2 import TransportEndpoint
from service.channel import channel
from spec.errors import TransferFailed
from worker.peers import Peers


class Remote:
    """A decode worker's end: one region, offered through two transports."""

    def __init__(self) -> None:
        self.transports: dict[str, Transport] = {"memory": MemoryTransport({}), "sockets": SocketsTransport()}
        self.regions: dict[str, Region] = {name: each.register(4096) for name, each in self.transports.items()}

    def endpoints(self, *broken: str) -> list[TransportEndpoint]:
        return [
            TransportEndpoint(
                name=name,
                address=b"nobody is here" if name in broken else transport.address,
                region=self.regions[name].descriptor,
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


async def test_the_best_is_taken_and_kept(remote: Remote, ours: dict[str, Transport]) -> None:
    peers = Peers(ours, channel)
    name, peer = await peers.connect("decode-0", 1, remote.endpoints())
    assert (name, peer.connected) == ("memory", True)
    assert (await peers.connect("decode-0", 1, remote.endpoints()))[1] is peer
    await peers.close()
    assert not peer.connected


async def test_one_that_does_not_get_through_gives_way_to_the_next(remote: Remote, ours: dict[str, Transport]) -> None:
    peers = Peers(ours, channel)
    for _ in range(2):  # the second time it is not even tried
        name, peer = await peers.connect("decode-0", 1, remote.endpoints("memory"))
        assert (name, peer.connected) == ("sockets", True)
    with pytest.raises(TransferFailed, match="decode-1"):
        await peers.connect("decode-1", 1, remote.endpoints("memory", "sockets"))
    with pytest.raises(TransferFailed, match="here memory, sockets"):
        await peers.connect("decode-2", 1, [])
    await peers.close()
    assert sum(transport.counts()["peers"] for transport in ours.values()) == 0


async def test_a_worker_that_restarted_is_connected_anew(remote: Remote, ours: dict[str, Transport]) -> None:
    peers = Peers(ours, channel)
    _, before = await peers.connect("decode-0", 1, remote.endpoints())
    _, after = await peers.connect("decode-0", 2, remote.endpoints())
    assert not before.connected
    assert after.connected
    await peers.close()
