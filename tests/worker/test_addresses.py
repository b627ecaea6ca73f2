"""What of an advertised address is the host."""

from __future__ import annotations

import pytest

from worker.endpoints import host_of


@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("decode-0:50071", "decode-0"),
        ("decode-0", "decode-0"),
        ("10.0.0.1:5", "10.0.0.1"),
        ("::1", "::1"),
        ("[fe80::1]:50071", "fe80::1"),
        ("[::1]", "::1"),
    ],
)
def test_the_host_of_an_address(address: str, host: str) -> None:
    assert host_of(address) == host
