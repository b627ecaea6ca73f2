"""Which transport a pair of workers takes, and what is said about those that cannot be had."""

from __future__ import annotations

import pytest

from kvtransfer import choose as choosing
from kvtransfer.choose import in_common, open_transports, probe
from spec.errors import InvalidConfiguration, TransportUnavailable


def test_what_both_have_best_first() -> None:
    opened, reasons = open_transports(["ucx", "sockets"])
    try:
        assert [transport.name for transport in opened] == ["ucx", "sockets"]
        assert reasons == {}
        for remote_names, expected in (
            (["sockets", "ucx"], ["ucx", "sockets"]),
            (["sockets"], ["sockets"]),
            (["memory"], []),
            ([], []),
        ):
            assert [transport.name for transport in in_common(opened, remote_names)] == expected
    finally:
        for transport in opened:
            transport.close()


def test_one_that_is_missing_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(host: str) -> None:
        raise TransportUnavailable("no libucp here")

    monkeypatch.setitem(choosing.KINDS, "ucx", missing)
    opened, reasons = open_transports(["ucx", "sockets"])
    opened[0].close()
    assert [transport.name for transport in opened] == ["sockets"]
    assert reasons == {"ucx": "no libucp here"}
    assert [(one.name, one.available) for one in probe()] == [("ucx", False), ("sockets", True)]


def test_an_unknown_name_is_refused_and_the_known_are_named() -> None:
    with pytest.raises(InvalidConfiguration, match="ucx, sockets"):
        open_transports(["nccl"])


def test_probe_names_what_libucp_runs_over() -> None:
    details = {one.name: one.detail for one in probe() if one.available}
    assert "tcp" in details["ucx"]
    assert "127.0.0.1" in details["sockets"]


def test_a_host_that_is_not_ours_is_unavailable() -> None:
    opened, reasons = open_transports(["sockets"], host="203.0.113.7")
    assert opened == []
    assert "203.0.113.7" in reasons["sockets"]
