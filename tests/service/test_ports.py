from __future__ import annotations

import socket

import pytest

from service.ports import free_port
from spec.errors import InvalidConfiguration


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_free_port_can_be_bound_and_is_named_again_by_its_number(host: str) -> None:
    port = free_port(host, 0)
    assert free_port(host, port) == port > 0
    with socket.create_server(("127.0.0.1", port)):
        with pytest.raises(InvalidConfiguration, match=rf"port {port} on {host} is taken") as refused:
            free_port(host, port)
        assert refused.value.details == {"key": "port", "port": str(port)}
        assert free_port(host, 0) != port


def test_a_host_that_is_none_is_named() -> None:
    with pytest.raises(InvalidConfiguration, match="no-such-host"):
        free_port("no-such-host.invalid", 0)


@pytest.mark.parametrize("port", [0, 50051])
def test_a_host_of_another_machine_is_named_and_not_the_port(port: int) -> None:
    with pytest.raises(InvalidConfiguration, match=r"host '192\.0\.2\.1' is no address of this machine") as refused:
        free_port("192.0.2.1", port)  # TEST-NET-1 of RFC 5737: nobody has it
    assert refused.value.details["key"] == "host"
