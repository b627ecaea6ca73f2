"""Finds a request its workers: waits in the line until a prefill worker has room and a decode worker grants blocks.

A reservation is asked for when prefill is about to start and not before, so that no decode memory is held by a request
that waits. While blocks are plenty, requests ask for them side by side; one that was refused keeps the head of the line
until it is served, so that small ones behind it do not eat what it waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc

from legato.v1 import worker_pb2
from router import policy
from router.line import Line, Place
from router.placement import Need, Placement, start_of
from router.registry import Model, Registry
from router.worker import Worker
from service import logs
from spec.errors import Draining, NoWorkers, OutOfBlocks, Overloaded, TicketRefused, WorkerLost

logger = logs.get(__name__)

ASK_AGAIN_S = 0.25  # blocks may come free without a word to this router: other routers' requests end too
EMPTY_POOL_GRACE_S = 30.0  # a worker that is started again is back before this
CALL_TIMEOUT_S = 5.0
# What one worker answers and another may not.
ANOTHER_MAY_TAKE_IT = (OutOfBlocks, Overloaded, Draining, WorkerLost, TicketRefused)


class Placer:
    """`decode_prefills_tokens`: prompts of up to so many tokens are prefilled by an idle decode worker itself."""

    def __init__(self, registry: Registry, line: Line, decode_prefills_tokens: int = 0) -> None:
        self.registry = registry
        self.line = line
        self._decode_prefills_tokens = decode_prefills_tokens
        self._empty: dict[bytes, tuple[int, float]] = {}  # by model: membership version and time when found empty

    async def place(self, need: Need, name: Callable[[], str]) -> Placement:
        """Until its workers are found; `name()` gives the id of the next placement. The caller sets the deadline.

        Raises NoWorkers when a pool stays empty, and what a worker says against the request itself.
        """
        refused = False
        with self.line.wait(was_placed=need.was_placed):
            while True:
                with self.line.stand(need.arrival) as place:
                    placement = await self._room(place, need, name)
                    while refused and not await self._ask(placement, need):
                        await self._blocks()
                        placement = await self._room(place, need, name)
                if refused or await self._ask(placement, need):
                    need.was_placed = True
                    return placement
                refused = True

    async def _blocks(self) -> None:
        await self.registry.room.beyond(self.registry.room.version, ASK_AGAIN_S)

    async def _room(self, place: Place, need: Need, name: Callable[[], str]) -> Placement:
        """Until a prefill worker has room; charges it."""
        while True:
            await place.first()
            seen = self.registry.room.version
            try:
                placement = self._choose(need, name)
            except NoWorkers:
                placement = None
                if self._empty_for_s(need.model) > EMPTY_POOL_GRACE_S:
                    raise
            if placement is not None:
                placement.open(need.computed_tokens)
                return placement
            await self.registry.room.beyond(seen, ASK_AGAIN_S)

    def _empty_for_s(self, model: Model) -> float:
        """How long nobody has come or gone, as far as requests that found a pool of the model empty can tell."""
        key, now_s = model.identity.SerializeToString(deterministic=True), asyncio.get_running_loop().time()
        version, since_s = self._empty.get(key, (-1, now_s))
        if version != self.registry.membership.version:
            since_s = now_s
            self._empty[key] = (self.registry.membership.version, now_s)
        return now_s - since_s

    def _choose(self, need: Need, name: Callable[[], str]) -> Placement | None:
        """None: all are busy. Raises NoWorkers when nobody is there who could."""
        registry, model = self.registry, need.model
        sequence = worker_pb2.SequenceState()
        sequence.CopyFrom(need.sequence)
        sequence.sequence_id = name()
        if need.ends_with_next_token and (alone := registry.lone_prefill_workers(model)):
            prefill = self._least_loaded(alone, need)
            return Placement(sequence, prefill, None) if prefill is not None else None
        if not registry.decode_workers(model):
            raise NoWorkers(f"no decode worker of {model.model_id} is ready", pool="decode")
        prefills = registry.prefill_workers(model)
        decode = self._emptiest(need, None)
        if decode is None:
            return None
        if policy.decode_prefills(
            len(prefills), need.computed_tokens, decode.decode_view(), self._decode_prefills_tokens
        ):
            return Placement(sequence, None, decode)
        prefill = self._least_loaded(prefills, need)
        decode = self._emptiest(need, prefill) if prefill is not None else None
        return Placement(sequence, prefill, decode) if decode is not None else None

    def _least_loaded(self, workers: list[Worker], need: Need) -> Worker | None:
        views = [worker.prefill_view() for worker in _unless(workers, need.avoid)]
        chosen = policy.choose_prefill(views, need.total_tokens)
        return self.registry.workers[chosen] if chosen is not None else None

    def _emptiest(self, need: Need, prefill: Worker | None) -> Worker | None:
        return next(iter(self._ranked(need, prefill)), None)

    def _ranked(self, need: Need, prefill: Worker | None) -> list[Worker]:
        capable = self.registry.decode_workers(need.model, prefill)
        workers, keeper = _unless(capable, need.avoid), None
        if prefill is not None and start_of(prefill) not in need.avoid:
            keeper = next((worker for worker in capable if start_of(worker) == need.keeper), None)
        if keeper is not None and keeper not in workers:
            workers = [*workers, keeper]
        views = [worker.decode_view() for worker in workers]
        ranked = policy.rank_decode(views, need.total_tokens, keeper.worker_id if keeper is not None else None)
        return [self.registry.workers[worker_id] for worker_id in ranked]

    # -- asking -------------------------------------------------------------------------------------------------------

    async def _ask(self, placement: Placement, need: Need) -> bool:
        """Reserves on the chosen decode worker, or on the next that will. False: nobody will now, nothing is held."""
        tried: set[str] = set()
        try:
            while placement.decode is not None:
                if await self._taken(placement, need):
                    return True
                tried.add(placement.decode.worker_id)
                others = [w for w in self._ranked(need, placement.prefill) if w.worker_id not in tried]
                if not others:
                    placement.close()
                    return False
                self._move(placement, others[0], need)
            return True  # it needs none
        except BaseException:
            self.give_up(placement)
            raise

    def _move(self, placement: Placement, decode: Worker, need: Need) -> None:
        """The same, on another decode worker."""
        placement.close()
        placement.decode = decode
        placement.open(need.computed_tokens)

    async def _taken(self, placement: Placement, need: Need) -> bool:
        decode = placement.decode
        assert decode is not None
        router_id = self.registry.router_id
        try:
            if placement.prefill is None:
                admit = worker_pb2.AdmitRequest(router_id=router_id, sequence=placement.sequence)
                await decode.decode.Admit(admit, timeout=CALL_TIMEOUT_S)
            else:
                await self.reserve(placement, need, placement.prefill)
            return True
        except grpc.aio.AioRpcError as rpc_error:
            slow = rpc_error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            error = WorkerLost(f"{decode.worker_id} is slow") if slow else decode.call_failed(rpc_error)
            if not isinstance(error, ANOTHER_MAY_TAKE_IT):
                raise error from None
            if not isinstance(error, OutOfBlocks | Overloaded | Draining):
                logger.info("%s does not take %s: %s", decode.worker_id, placement.sequence_id, error.message)
                self._abort(decode, placement.sequence_id)  # it may have taken it all the same
            return False

    async def reserve(self, placement: Placement, need: Need, producer: Worker) -> None:
        """On its decode worker, for KV that `producer` sends. Raises grpc.aio.AioRpcError."""
        assert placement.decode is not None
        reserve = worker_pb2.ReserveRequest(
            router_id=self.registry.router_id,
            sequence=placement.sequence,
            identity=need.model.identity,
            producer_id=producer.worker_id,
            producer_epoch=producer.record.epoch,
        )
        placement.reservation = await placement.decode.decode.Reserve(reserve, timeout=CALL_TIMEOUT_S)

    # -- giving up ----------------------------------------------------------------------------------------------------

    def give_up(self, placement: Placement) -> None:
        """Closes it, and tells the decode worker in the background: whoever gives up does not wait. Idempotent."""
        placement.close()
        if placement.decode is not None:
            self._abort(placement.decode, placement.sequence_id)

    def drop_target(self, placement: Placement) -> None:
        """The sequence stays where it is. Idempotent."""
        target, placement.target = placement.target, None
        placement.ahead.clear()
        if target is not None:
            self.give_up(target)

    def _abort(self, decode: Worker, sequence_id: str) -> None:
        if decode.linked:  # a worker whose link broke has given our sequences up itself
            self.registry.spawn(_send_abort(decode, sequence_id), name=f"abort {sequence_id}")


async def _send_abort(decode: Worker, sequence_id: str) -> None:
    try:
        await decode.decode.Abort(worker_pb2.AbortRequest(sequence_id=sequence_id), timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as rpc_error:
        decode.call_failed(rpc_error)


def _unless(workers: list[Worker], avoid: set[tuple[str, int]]) -> list[Worker]:
    """Those that have not failed this request; all, where every one has."""
    others = [worker for worker in workers if start_of(worker) not in avoid]
    return others or workers
