"""A sequence that runs goes on at another decode worker, its stream unbroken: the router's part of that.

    its worker drains, or is short of blocks and another has plenty (Balancer)
                      ──▶ Reserve on another, for the tokens known here ──▶ Move, asked of its own
                          last message of its own: moved ──▶ Placement.arrive(): the target is its decode worker
                          anything else ──▶ the target is given up, the sequence stays; tried again later

Until it has arrived the journey hears its own worker alone. What the target says before waits, and is forgotten where
the sequence stays: a target may have drawn tokens for a moment of which the source knows nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import grpc

from legato.v1 import worker_pb2
from router import policy
from router.placement import Need, Placement, start_of
from router.placer import Placer
from router.registry import Registry
from router.worker import Worker
from service import logs

logger = logs.get(__name__)

MOVE_TIMEOUT_S = 60.0  # of one sequence, which goes on meanwhile
FIRST_AGAIN_S, LAST_AGAIN_S = 0.25, 2.0  # between two attempts
LOOK_S = 1.0  # between two looks at who is short of blocks; reports of load are at most half of that old
LITTLE_ROOM = 0.1  # of its blocks: who waits on a worker that has less free waits for blocks


class Balancer:
    """Asks one sequence at a time to leave a decode worker that is short of blocks; policy.choose_move says which."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._preemptions: dict[tuple[str, int], int] = {}  # of each worker when it was last looked at

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.look()

    def look(self) -> None:
        """What was asked for at the last look and is not on its way by now is asked for no more."""
        by_model: dict[bytes, list[Worker]] = {}
        for worker in self._registry.workers.values():
            worker.asked = None
            if worker.ready and not worker.is_prefill:
                by_model.setdefault(worker.record.identity.SerializeToString(deterministic=True), []).append(worker)
        views = {key: [self._view(worker) for worker in workers] for key, workers in by_model.items()}
        workers = itertools.chain.from_iterable(by_model.values())
        self._preemptions = {start_of(worker): worker.load.preemptions for worker in workers}
        for move in filter(None, map(policy.choose_move, views.values())):
            logger.info("%s is short of blocks: %s is to move to %s", move.source, move.sequence_id, move.target)
            self._registry.workers[move.source].asked = move

    def _view(self, worker: Worker) -> policy.MoveView:
        load = worker.load
        has_preempted = load.preemptions > self._preemptions.get(start_of(worker), load.preemptions)
        has_room = load.free_blocks > worker.record.total_blocks * LITTLE_ROOM
        drawing = [charge for charge in worker.charges if charge.draws and not worker.moving]
        for charge in worker.charges:
            charge.draws = False
        return policy.MoveView(
            worker.decode_view(),
            has_preempted or (load.waiting_requests > 0 and not has_room),
            tuple((charge.tokens, charge.sequence_id) for charge in drawing),
        )


async def move_away(placer: Placer, placement: Placement, need: Need, name: Callable[[], str]) -> None:
    """As long as its worker sends it away: until it has moved. `name()` gives the id of the next placement.

    Whoever cancels this gives up placement.target, too."""
    again_s = FIRST_AGAIN_S
    source = placement.decode
    assert source is not None
    while source.sends_away(placement.sequence_id):
        for target in _targets(placer, need, source):
            async with source.moves:
                if await _move(placer, placement, need, target, name()):
                    return
        await asyncio.sleep(again_s)
        again_s = min(2 * again_s, LAST_AGAIN_S)


def _targets(placer: Placer, need: Need, source: Worker) -> list[Worker]:
    """Those that could take it over, the emptiest first; whether there is room now is their own answer."""
    if any(rank.host for rank in source.record.ranks):  # of several hosts it cannot send
        return []
    registry, only = placer.registry, None if source.record.draining or source.asked is None else source.asked.target
    others = [
        worker
        for worker in registry.decode_workers(need.model, source)
        if worker is not source and only in (None, worker.worker_id)
    ]
    views = [worker.decode_view() for worker in others if start_of(worker) not in need.avoid]
    return [registry.workers[worker_id] for worker_id in policy.rank_decode(views, need.total_tokens)]


async def _move(placer: Placer, placement: Placement, need: Need, decode: Worker, sequence_id: str) -> bool:
    """False: it stays, and nothing is held there. True: it has moved, as its source's last message says or will say."""
    source, sequence = placement.decode, worker_pb2.SequenceState()
    assert source is not None
    sequence.CopyFrom(need.sequence)
    sequence.sequence_id = sequence_id
    del sequence.output_token_ids[-1:]  # its KV is computed by a step that may be under way
    target = Placement(sequence, None, decode)
    target.open(need.computed_tokens, placement.events)
    placement.target = target
    asked = decode
    source.moving += 1
    try:
        await placer.reserve(target, need, source)
        asked = source
        request = worker_pb2.MoveRequest(
            sequence_id=placement.sequence_id, reservation=target.reservation, target_address=decode.record.address
        )
        await source.decode.Move(request, timeout=MOVE_TIMEOUT_S)
    except grpc.aio.AioRpcError as rpc_error:
        error = asked.call_failed(rpc_error)
        if placement.target is target:
            logger.info("%s stays on %s: %s", placement.sequence_id, source.worker_id, error.message)
            placer.drop_target(placement)
    finally:
        source.moving -= 1
    return placement.target is target or placement.decode is decode
