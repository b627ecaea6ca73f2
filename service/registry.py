"""Who is there: workers register themselves in Redis under a lease, routers watch.

    {cluster}:worker:{id}   a serialized WorkerRecord, gone `lease_s` after its last renewal
    {cluster}:workers       the ids, so that nobody scans a shared Redis for them; and, as a channel, word of a change

Redis may go away at any time: a registrar goes on trying, a watcher keeps what it knew and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self, cast

import redis.asyncio
from google.protobuf.message import DecodeError
from redis.exceptions import RedisError

from legato.v1 import worker_pb2
from service import logs
from spec.errors import InvalidConfiguration

Workers = dict[str, worker_pb2.WorkerRecord]

_TROUBLE = (RedisError, OSError, asyncio.TimeoutError)
_TIMEOUT_S = 2.0
_FIRST_BACKOFF_S, _LAST_BACKOFF_S = 0.1, 1.0
_ASK_AGAIN_S = 0.2
_POLL_S = 1.0

# KEYS: the worker's key, the ids. ARGV: record, lease in ms, id. Word goes out when the record is new or another.
_WRITE = """
local before = redis.call('get', KEYS[1])
redis.call('set', KEYS[1], ARGV[1], 'px', ARGV[2])
redis.call('sadd', KEYS[2], ARGV[3])
if before ~= ARGV[1] then redis.call('publish', KEYS[2], ARGV[3]) end
"""
# The same keys and ARGV[1], ARGV[2] = id: only one's own record is taken back, not that of a successor of the same id.
_REMOVE = """
if redis.call('get', KEYS[1]) == ARGV[1] then
  redis.call('del', KEYS[1])
  redis.call('srem', KEYS[2], ARGV[2])
  redis.call('publish', KEYS[2], ARGV[2])
end
"""
# KEYS: the ids. ARGV: what a worker's key begins with. Ids whose lease has run out are dropped.
_READ = """
local found = {}
for _, id in ipairs(redis.call('smembers', KEYS[1])) do
  local record = redis.call('get', ARGV[1] .. id)
  if record then found[#found + 1] = record else redis.call('srem', KEYS[1], id) end
end
return found
"""


def connect(redis_url: str) -> redis.asyncio.Redis:
    """A client that gives up on a call after 2 s and connects anew at the next."""
    client = redis.asyncio.Redis.from_url(
        redis_url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, health_check_interval=0
    )
    return client


async def check_redis(redis_url: str) -> None:
    """Raises InvalidConfiguration when no Redis answers there, or it is no URL of one; for the start of a process."""
    try:
        client = connect(redis_url)
        try:
            await client.ping()
        finally:
            await client.aclose()
    except (*_TROUBLE, ValueError) as error:
        where = _without_password(redis_url)
        raise InvalidConfiguration(f"no Redis answers at {where}: {error}", key="redis_url") from None


async def read_workers(client: redis.asyncio.Redis, cluster: str) -> Workers:
    """All workers whose lease is running, by id. Raises RedisError or OSError when Redis is away."""
    found = await _evaluate(client, _READ, [f"{cluster}:workers"], [f"{cluster}:worker:"])
    workers: Workers = {}
    for serialized in found:
        try:
            record = worker_pb2.WorkerRecord.FromString(serialized)
        except DecodeError:
            logs.get(__name__).warning("a record in the registry of %s is no WorkerRecord; it is left out", cluster)
            continue
        workers[record.worker_id] = record
    return workers


async def registered(client: redis.asyncio.Redis, cluster: str, worker_id: str) -> worker_pb2.WorkerRecord | None:
    """Of that worker, as it is registered now. None where it is not, or Redis is away."""
    try:
        return (await read_workers(client, cluster)).get(worker_id)
    except _TROUBLE:
        return None


class Registrar:
    """Keeps one worker's record alive while the `async with` lasts. Never raises into the service: see `registered`."""

    def __init__(self, redis_url: str, cluster: str, record: worker_pb2.WorkerRecord, lease_s: float = 5.0) -> None:
        """The record's `epoch` is another one at each start of the same worker_id; the latest start has the place."""
        self.registered = False  # Redis holds the record now, as far as is known
        self.superseded = False  # a later start of the same worker_id has taken the place
        self._client = connect(redis_url)
        self._keys = [f"{cluster}:worker:{record.worker_id}", f"{cluster}:workers"]
        self._record = worker_pb2.WorkerRecord()
        self._record.CopyFrom(record)
        self._lease_s = lease_s
        self._wrote = False  # once; whoever writes another epoch after that was started later
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def update(self, record: worker_pb2.WorkerRecord) -> None:
        """Writes the record anew (with `draining` set, say) as soon as Redis can be had."""
        assert record.worker_id == self._record.worker_id, "a registrar is of one worker"
        self._record.CopyFrom(record)
        self._changed.set()

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._renew(), name="registrar")
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Takes the record back, if Redis can be had. Idempotent."""
        if self._task is None:
            return
        await _end(self._task)
        self._task = None
        with contextlib.suppress(*_TROUBLE):
            serialized = self._record.SerializeToString()
            await _evaluate(self._client, _REMOVE, self._keys, [serialized, self._record.worker_id])
        self.registered = False
        with contextlib.suppress(*_TROUBLE):
            await self._client.aclose()

    async def _renew(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self.superseded:
            self._changed.clear()
            try:
                await self._write()
                self.registered, backoff_s, wait_s = not self.superseded, _FIRST_BACKOFF_S, self._lease_s / 3
            except _TROUBLE as error:
                if self.registered or backoff_s == _FIRST_BACKOFF_S:
                    logs.get(__name__).warning("the registry cannot be reached, trying on: %s", error)
                self.registered, wait_s, backoff_s = False, backoff_s, min(2 * backoff_s, _LAST_BACKOFF_S)
            # Not wait_for(): before Python 3.12 it loses a cancellation that comes together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
        logs.get(__name__).error("%s was started again elsewhere; this one registers no more", self._record.worker_id)

    async def _write(self) -> None:
        before = cast("bytes | None", await self._client.get(self._keys[0]))
        if self._wrote and before is not None and _epoch_of(before) != self._record.epoch:
            self.superseded = True
            return
        serialized = self._record.SerializeToString()
        await _evaluate(
            self._client, _WRITE, self._keys, [serialized, int(self._lease_s * 1000), self._record.worker_id]
        )
        self._wrote = True


class Watcher:
    """What workers there are, kept up to date while the `async with` lasts.

    `workers` is the last known state. While Redis is away it stays as it was and `reachable` is False; for `grace_s`
    after Redis came back (perhaps empty) a worker that is missing is kept too: it needs a moment to register anew.
    """

    def __init__(self, redis_url: str, cluster: str, grace_s: float = 5.0) -> None:
        self.workers: Workers = {}
        self.reachable = False
        self._client = connect(redis_url)
        self._cluster = cluster
        self._grace_s = grace_s
        self._keep_until_s = 0.0
        self._version = 0
        self._condition = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch(), name="watcher")
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends snapshots() for everyone. Idempotent."""
        if self._task is not None:
            await _end(self._task)
            self._task = None
            async with self._condition:
                self._condition.notify_all()
            with contextlib.suppress(*_TROUBLE):
                await self._client.aclose()

    async def snapshots(self) -> AsyncIterator[Workers]:
        """The full state: once when it is first known, then whenever it or `reachable` changed. A slow reader gets the
        newest only."""
        seen = 0
        while True:
            async with self._condition:
                await self._condition.wait_for(self._is_newer_than(seen))
                if self._task is None:
                    return
                seen, snapshot = self._version, dict(self.workers)
            yield snapshot

    def _is_newer_than(self, seen: int) -> Callable[[], bool]:
        return lambda: self._version != seen or self._task is None

    async def _watch(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                async with self._client.pubsub(ignore_subscribe_messages=True) as channel:
                    await channel.subscribe(f"{self._cluster}:workers")
                    while True:
                        await self._take(await read_workers(self._client, self._cluster))
                        backoff_s = _FIRST_BACKOFF_S
                        await channel.get_message(timeout=_POLL_S)
            except _TROUBLE as error:
                if self.reachable or not self._version:
                    logs.get(__name__).warning("the registry cannot be reached, going on with what is known: %s", error)
                await self._lost()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, _LAST_BACKOFF_S)

    async def _take(self, found: Workers) -> None:
        now_s = asyncio.get_running_loop().time()
        if not self.reachable and self.workers:  # back after an outage
            self._keep_until_s = now_s + self._grace_s
        if now_s < self._keep_until_s:
            found = {**self.workers, **found}
        if found != self.workers or not self.reachable:
            await self._announce(found, reachable=True)

    async def _lost(self) -> None:
        if self.reachable or not self._version:
            await self._announce(self.workers, reachable=False)

    async def _announce(self, workers: Workers, *, reachable: bool) -> None:
        async with self._condition:
            self.workers, self.reachable = workers, reachable
            self._version += 1
            self._condition.notify_all()


async def _evaluate(client: redis.asyncio.Redis, script: str, keys: list[str], arguments: list[Any]) -> Any:
    """EVALSHA, and the script itself where the server does not know it (anew)."""
    run = cast("Callable[..., Awaitable[Any]]", client.register_script(script))
    return await run(keys=keys, args=arguments)


async def _end(task: asyncio.Task[None]) -> None:
    """Asks until it has ended: a connection that breaks while it closes can put its own error over a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait({task}, timeout=_ASK_AGAIN_S)


def _epoch_of(serialized: bytes) -> int:
    try:
        return worker_pb2.WorkerRecord.FromString(serialized).epoch
    except DecodeError:
        return 0


def _without_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
