"""Names and addresses of hosts: those that lead nowhere fail by a typed error, those of IPv6 serve as well as IPv4."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from kvtransfer.choose import open_transports
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Piece
from legato.v1.transfer_pb2 import SocketsAddress
from spec.errors import TransferFailed


def has_ipv6_loopback() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.fixture
def transport() -> Iterator[SocketsTransport]:
    opened = SocketsTransport()
    yield opened
    opened.close()


NO_NAMES = ["a" * 64 + ".example", "a" * 300, "..", "two words", "nul\0nul", "\ud7ff", "[::1]"]


@pytest.mark.parametrize("name", NO_NAMES)
@pytest.mark.parametrize("unix_path", ["", "@nobody", "not\0abstract", "x" * 300])
def test_a_peer_whose_name_cannot_be_is_not_connected(transport: SocketsTransport, name: str, unix_path: str) -> None:
    where = SocketsAddress.FromString(transport.address)
    where.tcp_host, where.unix_path = name, unix_path
    region = transport.register(8)
    with pytest.raises(TransferFailed, match="no peer answers"):
        transport.connect(where.SerializeToString(), region.descriptor, timeout_s=1.0)
    assert transport.counts()["peers"] == 0


@pytest.mark.parametrize("port", [0, 65536, 2**32 - 1])
def test_a_peer_whose_port_cannot_be_is_not_connected(transport: SocketsTransport, port: int) -> None:
    where = SocketsAddress(tcp_host="127.0.0.1", tcp_port=port)
    with pytest.raises(TransferFailed, match="no peer answers"):
        transport.connect(where.SerializeToString(), transport.register(8).descriptor, timeout_s=1.0)


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_host_whose_name_cannot_be_makes_sockets_unavailable(name: str) -> None:
    opened, reasons = open_transports(["sockets"], host=name)
    assert opened == []
    assert "cannot listen" in reasons["sockets"]


@pytest.mark.parametrize("name", ["localhost", "worker-3.example"])
def test_libucp_takes_a_host_by_name(name: str) -> None:
    opened, reasons = open_transports(["ucx"], host=name)
    for transport in opened:
        transport.close()
    assert reasons == {}


@pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no IPv6 loopback")
@pytest.mark.parametrize("name", ["sockets", "ucx"])
def test_bytes_move_by_ipv6(name: str) -> None:
    (owner,), _ = open_transports([name], host="::1")
    (writer,), _ = open_transports([name], host="::1")
    region, source = owner.register(431), writer.register(431)
    source.buffer[:] = bytes(range(200)) + bytes(range(231))
    address = owner.address
    if name == "sockets":
        where = SocketsAddress.FromString(address)
        where.unix_path = ""
        address = where.SerializeToString()
        assert f"[::1]:{where.tcp_port}" in owner.detail
    peer = writer.connect(address, region.descriptor)
    peer.post(source, [Piece(0, 0, 431)]).result(10)
    assert bytes(region.buffer) == bytes(source.buffer)
    peer.release()
    writer.close()
    owner.close()
