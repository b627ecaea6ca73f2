"""Which workers there are, and which models they serve together.

What Redis says comes as snapshots (service.registry.Watcher). A worker that is in none any more but still answers
stays: Redis may have restarted empty, and no request is lost for that. One that does not answer is gone for good, and
so is one whose id came back with another epoch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from typing import Any

import grpc

from legato.v1 import common_pb2, worker_pb2
from router.pulse import Pulse
from router.worker import Worker
from service import logs
from service.channel import Channel
from service.messages import adapter_id, serves, with_adapter
from service.tokenizer import Tokenizer
from service.wire import agreed
from spec.errors import LegatoError, NoWorkers, UnknownModel, WireMismatch, WorkerLost

logger = logs.get(__name__)

TOKENIZER_AGAIN_S = 5.0
UNLEASED_LOOK_S = 0.5


def compatible(producer: worker_pb2.WorkerRecord, decode: worker_pb2.WorkerRecord) -> bool:
    """Whether KV of what both serve can go from one to the other: the same model and revision. How either side cuts it
    over ranks and into blocks, and in which dtype it keeps it, is all the same. Not to one without an endpoint, nor
    to one that speaks no version of the wire in common."""
    if producer.identity != decode.identity or not decode.endpoints:
        return False
    try:
        return agreed(producer.wire, decode.wire, decode.worker_id) > 0
    except WireMismatch:
        return False


@dataclasses.dataclass(frozen=True, slots=True)
class Model:
    """One model at one revision, with one adapter at one revision or none: requests never change it while they run."""

    identity: worker_pb2.ModelIdentity
    tokenizer: Tokenizer
    vocab_size: int
    eos_token_ids: frozenset[int]
    longest_token_bytes: int  # no token stands for more of a text than this

    @property
    def model_id(self) -> str:
        return self.identity.model_id

    def with_adapter(self, adapter: common_pb2.Adapter) -> Model:
        identity = with_adapter(self.identity, adapter_id(adapter.name, adapter.revision))
        return dataclasses.replace(self, identity=identity)


class Registry:
    """`dial(address)` makes a channel to a worker; `read_tokenizer(model_path)` runs in a thread."""

    def __init__(
        self,
        router_id: str,
        dial: Callable[[str], Channel],
        read_tokenizer: Callable[[str], Tokenizer],
    ) -> None:
        self.router_id = router_id
        self.workers: dict[str, Worker] = {}
        self.room = Pulse()  # blocks, backlog or a worker came free
        self.membership = Pulse()  # a worker became ready, or stopped being so; a model became known
        self._dial = dial
        self._read_tokenizer = read_tokenizer
        self._models: dict[bytes, Model] = {}
        self._longest_tokens: dict[bytes, dict[int, int]] = {}
        self._last_adapters: dict[bytes, Sequence[common_pb2.Adapter]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._reading: set[bytes] = set()
        self._closed = False

    # -- who is there -------------------------------------------------------------------------------------------------

    def prefill_workers(self, model: Model) -> list[Worker]:
        """Ready, and with at least one ready decode worker that can take its KV."""
        return [p for p in self._ready(model, worker_pb2.PREFILL) if self.decode_workers(model, p)]

    def decode_workers(self, model: Model, producer: Worker | None = None) -> list[Worker]:
        """Ready; those that can take `producer`'s KV, where one is given."""
        ready = self._ready(model, worker_pb2.DECODE)
        return [d for d in ready if producer is None or compatible(producer.record, d.record)]

    def lone_prefill_workers(self, model: Model) -> list[Worker]:
        """Ready, whether or not anybody could take its KV: enough where one token is left to draw."""
        return self._ready(model, worker_pb2.PREFILL)

    def _ready(self, model: Model, role: worker_pb2.Role) -> list[Worker]:
        return [
            worker
            for worker in self.workers.values()
            if worker.ready and worker.record.role == role and serves(worker.record, model.identity)
        ]

    # -- models ---------------------------------------------------------------------------------------------------

    def models(self) -> list[Model]:
        """With at least one worker there, ready or not, by id; the newest revision last."""
        present = {_key(worker.record) for worker in self.workers.values()}
        return sorted((m for key, m in self._models.items() if key in present), key=lambda model: model.model_id)

    def model(self, model_id: str, adapter: str = "") -> Model:
        """The one asked for, "" being the only one, with the adapter of that name, if any; where several revisions are
        served, one that has both pools.

        Raises UnknownModel naming those served, NoWorkers when none is."""
        known = self.models() or list(self._models.values())
        names = sorted({model.model_id for model in known})
        if not names:
            raise NoWorkers("no worker has registered yet")
        if not model_id and len(names) > 1:
            raise UnknownModel(f"say which model; served are {', '.join(names)}", served=", ".join(names))
        asked = [model for model in known if model.model_id == (model_id or names[0])]
        if not asked:
            raise UnknownModel(
                f"model {model_id!r} is not served; served are {', '.join(names)}", served=", ".join(names)
            )
        if adapter:
            asked = self._adapted(asked, adapter)
        return max(asked, key=lambda model: (bool(self.prefill_workers(model)), bool(self.decode_workers(model))))

    def _adapted(self, models: list[Model], name: str) -> list[Model]:
        adapters = [(model, adapter) for model in models for adapter in self.adapters(model)]
        asked = [model.with_adapter(adapter) for model, adapter in adapters if adapter.name == name]
        if not asked:
            names = ", ".join(sorted({adapter.name for _, adapter in adapters})) or "none"
            raise UnknownModel(
                f"model {models[0].model_id!r} has no adapter {name!r}; its adapters are {names}", adapters=names
            )
        return asked

    def adapters(self, model: Model) -> list[common_pb2.Adapter]:
        """Of the base model: those that a worker has, ready or not, by name; where no worker is there, those that the
        last one to come had."""
        present = [w.record.adapters for w in self.workers.values() if w.record.identity == model.identity]
        key = model.identity.SerializeToString(deterministic=True)
        each = itertools.chain.from_iterable(present or [self._last_adapters.get(key, ())])
        found = sorted({(adapter.name, adapter.revision) for adapter in each})
        return [common_pb2.Adapter(name=name, revision=revision) for name, revision in found]

    def context_tokens(self, model: Model) -> int:
        """The longest sequence that both pools take; of a pool that is empty, what it took last."""
        longest = self._longest_tokens.setdefault(model.identity.SerializeToString(deterministic=True), {})
        for role in (worker_pb2.PREFILL, worker_pb2.DECODE):
            of_role = [w for w in self.workers.values() if w.record.role == role and serves(w.record, model.identity)]
            if of_role:
                longest[role] = max(worker.longest_tokens for worker in of_role)
        return min(longest.values(), default=0)

    def serves(self) -> bool:
        """At least one model has a ready decode worker: it prefills itself where no prefill worker is."""
        return any(self.decode_workers(model) for model in self._models.values())

    # -- how it learns ------------------------------------------------------------------------------------------------

    async def follow(self, snapshots: AsyncIterator[Mapping[str, worker_pb2.WorkerRecord]]) -> None:
        async for records in snapshots:
            self.apply(records)

    def apply(self, records: Mapping[str, worker_pb2.WorkerRecord]) -> None:
        """What Redis says now is all that is registered."""
        for worker_id, worker in list(self.workers.items()):
            record = records.get(worker_id)
            if record is None:
                self._unleased(worker)
            elif record.epoch == worker.record.epoch:
                self._renewed(worker, record)
            else:
                self._retire(worker, WorkerLost(f"{worker_id} restarted", worker_id=worker_id))
        for worker_id, record in records.items():
            if worker_id not in self.workers:
                self._join(record)

    def _join(self, record: worker_pb2.WorkerRecord) -> None:
        logger.info("%s registered at %s", record.worker_id, record.address)
        channel = self._dial(record.address)
        self._say_who_is_not_paired(record)
        worker = Worker(record, channel, self.router_id, changed=self.room.fire, moved=self._moved)
        self.workers[record.worker_id] = worker
        key = _key(record)
        self._last_adapters[key] = record.adapters
        if key not in self._models and key not in self._reading:
            self._reading.add(key)
            self.spawn(self._read_model(record), name=f"read tokenizer of {record.identity.model_id}")

    def _say_who_is_not_paired(self, record: worker_pb2.WorkerRecord) -> None:
        for other in self.workers.values():
            if other.record.role != record.role and other.record.identity == record.identity:
                try:
                    agreed(other.record.wire, record.wire, record.worker_id)
                except WireMismatch as error:
                    logger.warning("%s and %s are not paired: %s", other.record.worker_id, record.worker_id, error)

    def _renewed(self, worker: Worker, record: worker_pb2.WorkerRecord) -> None:
        worker.leased = True
        turned = record.draining != worker.record.draining
        worker.record = record
        if turned:
            self._moved()

    def _unleased(self, worker: Worker) -> None:
        if worker.leased:
            worker.leased = False
            self.spawn(self._look_at(worker), name=f"look at {worker.worker_id}")

    async def _look_at(self, worker: Worker) -> None:
        """Its registration is gone. It stays as long as it answers."""
        while not worker.leased and not worker.retired:
            try:
                await worker.refresh()
            except grpc.RpcError:
                if not worker.leased:
                    message = f"{worker.worker_id} left: its registration ended and it does not answer"
                    self._retire(worker, WorkerLost(message, worker_id=worker.worker_id))
                return
            await asyncio.sleep(UNLEASED_LOOK_S)

    def _retire(self, worker: Worker, error: LegatoError) -> None:
        logger.warning("%s", error.message)
        if self.workers.get(worker.worker_id) is worker:
            del self.workers[worker.worker_id]
        self.spawn(worker.retire(error), name=f"retire {worker.worker_id}")
        self._moved()

    def _moved(self) -> None:
        self.membership.fire()
        self.room.fire()

    async def _read_model(self, record: worker_pb2.WorkerRecord) -> None:
        """Until it can be read: the folder may still be on its way to this machine."""
        while not self._closed:
            try:
                model = await asyncio.to_thread(_model_of, record, self._read_tokenizer)
            except LegatoError as error:
                logger.error("no tokenizer for %s yet: %s", record.identity.model_id, error.message)
                await asyncio.sleep(TOKENIZER_AGAIN_S)
                continue
            self._models[_key(record)] = model
            self._moved()
            return

    # -- tasks that outlive the request which started them ------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (failure := task.exception()) is not None:
            logger.error("%s failed", task.get_name(), exc_info=failure)

    @property
    def tasks(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        self._closed = True
        workers, self.workers = list(self.workers.values()), {}
        gone = WorkerLost("the router is stopping")
        await asyncio.gather(*(worker.retire(gone) for worker in workers))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _model_of(record: worker_pb2.WorkerRecord, read_tokenizer: Callable[[str], Tokenizer]) -> Model:
    """Reads the disk: call in a thread."""
    tokenizer = read_tokenizer(record.model_path)
    vocab_size = record.vocab_size or tokenizer.vocab_size
    alone = (tokenizer.stream(skip_special=False) for _ in range(tokenizer.vocab_size))
    texts = (stream.push([token_id]) + stream.finish() for token_id, stream in enumerate(alone))
    return Model(
        identity=record.identity,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_token_ids=frozenset(record.eos_token_ids),
        longest_token_bytes=max(len(text.encode()) for text in texts),
    )


def _key(record: worker_pb2.WorkerRecord) -> bytes:
    return record.identity.SerializeToString(deterministic=True)
