"""What proves that the memory of a broken hand-over is quiet: the writer's own word, or a cut that was made."""

from __future__ import annotations

import asyncio
import contextlib
import types
import typing
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

import worker.quarantine
from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel
from service.host import Host
from service.ports import free_port
from spec.errors import TransferFailed
from worker.control import WorkerService
from worker.quarantine import Quarantine

KEY = "a key for tests"
TICKET = worker_pb2.Ticket(reservation_id="r", producer_id="prefill-0", producer_epoch=5)
nobody = typing.cast("Any", None)


class Asked:
    """Workers as the product answers for them; `asked` is what they were asked for, `cuts` what was cut."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cuts: list[tuple[str, int]] = []
        self.records: dict[str, worker_pb2.WorkerRecord] = {}
        self.proofs: list[str] = []
        self.unproven_cuts = 0  # so many cuts prove nothing

    @contextlib.asynccontextmanager
    async def worker(self, worker_id: str, epoch: int) -> AsyncIterator[str]:
        async def confirm_quiet(reservation_id: str) -> None:
            self.asked.append(f"{worker_id}/{epoch} {reservation_id}")

        record = worker_pb2.WorkerRecord(worker_id=worker_id, epoch=epoch)
        core = typing.cast("Any", types.SimpleNamespace(record=record))
        service = WorkerService(core, nobody, nobody, nobody, confirm_quiet, nobody, nobody)
        async with Host("127.0.0.1", 0, internal_key=KEY) as host:
            host.add(worker_pb2_grpc.add_WorkerServicer_to_server, service, "legato.v1.Worker", internal=True)
            yield host.address

    def register(self, worker_id: str, epoch: int, address: str) -> None:
        record = worker_pb2.WorkerRecord(worker_id=worker_id, epoch=epoch, address=address)
        self.records[worker_id] = record

    def cut(self, transport: str, links: Sequence[worker_pb2.HandoffRequest.Link]) -> None:
        self.cuts += [(transport, link.link_id) for link in links]
        if len(self.cuts) <= self.unproven_cuts:
            raise TransferFailed("it has this memory mapped, and lives")

    def quarantine(self, key: str = KEY) -> Quarantine:
        async def find_record(worker_id: str) -> worker_pb2.WorkerRecord | None:
            return self.records.get(worker_id)

        return Quarantine(
            self.cut, lambda address: channel(address, key), find_record, lambda proof, _: self.proofs.append(proof)
        )

    async def says_so(self, said_address: str) -> bool:
        return await self.quarantine()._says_so(TICKET, said_address)


async def test_the_writer_itself_is_believed() -> None:
    there = Asked()
    async with there.worker("prefill-0", 5) as address:
        assert await there.says_so(address)
    assert there.asked == ["prefill-0/5 r"]


@pytest.mark.parametrize(
    ("worker_id", "epoch"), [("prefill-1", 5), ("prefill-0", 4), ("prefill-0", 6)], ids=["other", "older", "later"]
)
async def test_nobody_else_is_believed(worker_id: str, epoch: int) -> None:
    """Nor does it wait for what it runs under a reservation of that name."""
    there = Asked()
    async with there.worker(worker_id, epoch) as address:
        assert not await there.says_so(address)
    assert not there.asked


async def test_nor_is_who_refuses_or_is_no_worker_of_ours() -> None:
    there = Asked()
    assert not await there.says_so(f"127.0.0.1:{free_port('127.0.0.1', 0)}")
    async with there.worker("prefill-0", 5) as address:
        assert not await there.quarantine("another key")._says_so(TICKET, address)
    async with Host("127.0.0.1", 0, internal_key=KEY) as host:
        assert not await there.says_so(host.address)


async def test_a_registered_writer_is_asked_where_it_is_registered() -> None:
    """Whatever its stream said; another start of it elsewhere does not answer for it."""
    there = Asked()
    async with there.worker("prefill-0", 5) as writer, there.worker("prefill-1", 5) as forged:
        there.register("prefill-0", 5, writer)
        assert await there.says_so(forged)
        there.register("prefill-0", 6, forged)
        assert await there.says_so(writer)
        assert not await there.says_so(forged)
    assert there.asked == ["prefill-0/5 r"] * 2


LINKS = [worker_pb2.HandoffRequest.Link(link_id=77)]


class Broken:
    """A receiver whose stream broke."""

    def __init__(self, address: str) -> None:
        self.ticket = TICKET
        self.begin = worker_pb2.HandoffRequest.Begin(producer_address=address, transport="sockets", links=LINKS)
        self.is_gone = self.is_quiet = False

    def writer_gone(self) -> None:
        self.is_gone = True

    def quiet(self) -> None:
        self.is_quiet = True


async def emptied(quarantine: Quarantine) -> None:
    async with asyncio.timeout(10):
        while len(quarantine):
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("unproven_cuts", [0, 2])
async def test_without_its_word_its_link_is_cut_until_that_is_proven(
    monkeypatch: pytest.MonkeyPatch, unproven_cuts: int
) -> None:
    monkeypatch.setattr(worker.quarantine, "ASK_AGAIN_S", 0.05)
    there = Asked()
    there.unproven_cuts = unproven_cuts
    async with there.worker("prefill-0", 6) as successor:
        quarantine, broken = there.quarantine(), Broken(successor)
        quarantine.take(typing.cast("Any", broken))
        while len(there.cuts) <= unproven_cuts:
            assert not broken.is_quiet
            assert len(quarantine) == 1
            await asyncio.sleep(0.005)
        await emptied(quarantine)
    assert broken.is_gone
    assert broken.is_quiet
    assert there.cuts == [("sockets", 77)] * (unproven_cuts + 1)
    assert there.proofs == ["cut"]


async def test_with_its_word_nothing_is_cut() -> None:
    there = Asked()
    async with there.worker("prefill-0", 5) as address:
        quarantine, broken = there.quarantine(), Broken(address)
        quarantine.take(typing.cast("Any", broken))
        await emptied(quarantine)
    assert broken.is_quiet
    assert not there.cuts
    assert there.proofs == ["word"]
