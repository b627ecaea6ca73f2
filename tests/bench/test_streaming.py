"""bench.streaming times hand-overs that the other process has found right, and no others."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from typing import IO

import pytest

import kvtransfer.digest
from bench.streaming import measure, other_process
from bench.streaming_target import Where
from spec.errors import LegatoError

OPTIONS = argparse.Namespace(
    transport="sockets", tokens=37, layers=3, kv_heads=1, group_mib=0.01, compute=1.0, rounds=2
)


@pytest.fixture(scope="module")
def far() -> Iterator[tuple[Where, IO[str]]]:
    with other_process(OPTIONS) as process:
        yield process


def test_every_variant_is_measured_in_every_round(far: tuple[Where, IO[str]]) -> None:
    measured = asyncio.run(measure(OPTIONS, *far))
    assert {name: len(found) for name, found in measured.items()} == {
        f"{kind}, digests {digests}": 2 for kind in ("serial", "streamed", "full rate") for digests in ("always", "off")
    }
    assert all(each.near_cpu_s > 0 and each.far_cpu_s > 0 for found in measured.values() for each in found)


def test_what_did_not_land_as_it_was_sent_is_no_figure(
    far: tuple[Where, IO[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kvtransfer.digest, "digest_of", lambda sums: bytes(16))
    with pytest.raises(LegatoError):
        asyncio.run(measure(OPTIONS, *far))
