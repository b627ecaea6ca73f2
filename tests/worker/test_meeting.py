"""Workers meet through the registry: ahead of any request, and anew when one was started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import types
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import worker.meeting
from kvtransfer.probing import PROBE_BYTES
from kvtransfer.sockets import SocketsTransport
from legato.v1 import worker_pb2
from service.channel import channel
from service.registry import Registrar
from service.wire import spoken
from worker.meeting import Meetings
from worker.peers import Peers

IDENTITY = worker_pb2.ModelIdentity(model_id="m", revision="r", compute_dtype="float32")


class Decode:
    """A decode worker's life as others see it."""

    def __init__(self, epoch: int) -> None:
        self.transport = SocketsTransport()
        self.region = self.transport.register(4096 + PROBE_BYTES)
        endpoint = worker_pb2.TransportEndpoint(
            name="sockets", address=self.transport.address, region=self.region.descriptor, probe_offset=4096
        )
        self.record = worker_pb2.WorkerRecord(
            worker_id="decode-0",
            role=worker_pb2.DECODE,
            epoch=epoch,
            address="127.0.0.1:7",
            identity=IDENTITY,
            endpoints=[endpoint],
            wire=spoken(),
        )


class Core(types.SimpleNamespace):
    """What a meeting knows of a prefill worker."""

    def __init__(self, redis_url: str, cluster: str) -> None:
        record = worker_pb2.WorkerRecord(worker_id="prefill-0", identity=IDENTITY, address="127.0.0.1:6")
        record.wire.CopyFrom(spoken())
        met: list[str] = []
        super().__init__(
            config=types.SimpleNamespace(redis_url=redis_url, cluster=cluster),
            record=record,
            met=met,
            meter=types.SimpleNamespace(met=lambda transport, over, measured: met.append(f"{transport} {over}")),
        )


@pytest.fixture
def core(redis_url: str) -> Core:
    return Core(redis_url, f"meeting-{secrets.token_hex(4)}")


@pytest.fixture
def decode() -> Iterator[Decode]:
    made = Decode(epoch=1)
    yield made
    made.transport.close()


@contextlib.asynccontextmanager
async def joined(core: Core) -> AsyncIterator[Peers]:
    transport = SocketsTransport()
    region = transport.register(4096 + PROBE_BYTES)
    peers = Peers({"sockets": transport}, channel, {"sockets": region})
    core.meetings = meetings = Meetings(core, peers)  # type: ignore[arg-type]
    try:
        yield peers
    finally:
        await meetings.close()
        await peers.close()
        transport.close()


async def eventually(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def registered(core: Core, decode: Decode) -> Registrar:
    return Registrar(core.config.redis_url, core.config.cluster, decode.record)


async def test_before_any_request_and_again_after_a_restart(
    core: Core, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker.meeting, "AGAIN_S", 1e6)  # a new life is no second try
    async with joined(core) as peers:
        async with registered(core, decode):
            await eventually(lambda: peers.is_connected(decode.record))
            await eventually(lambda: core.met == ["sockets unix socket"])
        decode.transport.close()  # it dies, and is started again
        successor = Decode(epoch=2)
        try:
            async with registered(core, successor):
                await eventually(lambda: len(core.met) == 2)
                assert peers.is_connected(successor.record)
                assert not peers.is_connected(decode.record)
                assert [(link.worker_id, link.taken) for link in peers.links()] == [("decode-0", True)]
        finally:
            successor.transport.close()


async def test_only_those_that_take_this_models_kv_and_speak_the_same(
    core: Core, decode: Decode, caplog: pytest.LogCaptureFixture
) -> None:
    other = worker_pb2.WorkerRecord()
    other.CopyFrom(decode.record)
    other.worker_id, other.identity.revision = "decode-1", "another"
    newer = worker_pb2.WorkerRecord()
    newer.CopyFrom(decode.record)
    newer.worker_id, newer.wire.oldest, newer.wire.newest = "decode-2", 7, 9
    async with joined(core) as peers, contextlib.AsyncExitStack() as stack:
        for record in (other, newer, decode.record):
            await stack.enter_async_context(Registrar(core.config.redis_url, core.config.cluster, record))
        await eventually(lambda: core.met)
        await eventually(lambda: "decode-2 is not paired: decode-2 speaks versions 7 to 9" in caplog.text)
        assert [link.worker_id for link in peers.links()] == ["decode-0"]
    assert caplog.text.count("is not paired") == 1


async def test_tcp_between_two_that_have_rdma_is_a_warning_that_names_both(
    core: Core, decode: Decode, caplog: pytest.LogCaptureFixture
) -> None:
    from legato.v1.transfer_pb2 import SocketsAddress

    where = SocketsAddress.FromString(decode.record.endpoints[0].address)
    where.unix_path = ""  # as of another host
    decode.record.endpoints[0].address = where.SerializeToString()
    with caplog.at_level(logging.WARNING):
        for one_has_none in (([], ["mlx5_0"]), (["mlx5_0"], [])):
            core.record.rdma_devices[:], decode.record.rdma_devices[:] = one_has_none
            core.met.clear()
            async with joined(core), registered(core, decode):
                await eventually(lambda: core.met == ["sockets tcp"])
            assert "RDMA" not in caplog.text
        decode.record.rdma_devices.append("mlx5_3")
        core.met.clear()
        async with joined(core), registered(core, decode):
            await eventually(lambda: core.met and "RDMA" in caplog.text)
    assert "prefill-0 at 127.0.0.1:6 and decode-0 at 127.0.0.1:7 both have RDMA (mlx5_0; mlx5_3)" in caplog.text


async def test_one_that_cannot_be_reached_harms_nobody(core: Core, decode: Decode) -> None:
    gone = Decode(epoch=1)
    gone.record.worker_id = "decode-9"
    gone.transport.close()
    async with joined(core) as peers, registered(core, gone), registered(core, decode):
        await eventually(lambda: peers.is_connected(decode.record))
        assert not peers.is_connected(gone.record)


async def test_one_that_left_is_forgotten(core: Core, decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its connections, once no hand-over has to do with it."""
    monkeypatch.setattr(worker.meeting, "FORGET_S", 0.3)
    async with joined(core) as peers:
        async with registered(core, decode):
            await eventually(lambda: core.met)
            await peers.channel("decode-0", decode.record.address)
            link = peers.link("decode-0", 0)
            await asyncio.sleep(1.0)
            assert peers.is_connected(decode.record)
        await eventually(lambda: not core.meetings._not_before_s)
        await asyncio.sleep(1.0)
        assert peers.known() == {"decode-0"}
        del link
        await eventually(lambda: not peers.known())
