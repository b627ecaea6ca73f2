"""What a fault does to the world, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import grpc

from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel
from tests.simulation import schedule as kinds
from tests.simulation.cluster import KEY, PORT
from tests.simulation.loop import Process
from tests.simulation.schedule import FAULTS_END_S, Fault

if TYPE_CHECKING:
    from tests.simulation.world import World

LONGEST_WAIT_S = 1.0  # for a worker to write something
LOOK_S = 0.3  # whether a fault has anybody left to trouble

story = logging.getLogger("legato.simulation")


class Faults:
    """Of one world; `begun_s` is when its requests begin to come."""

    def __init__(self, world: World, begun_s: float) -> None:
        self._world = world
        self._loop, self._rng = world.loop, world.rng
        self._network, self._fabric, self._store = world.around.network, world.around.fabric, world.around.store
        self._begun_s = begun_s
        self._acts: dict[str, Callable[[Fault, float], Awaitable[None]]] = {
            kinds.PREFILL_DIES: self._die,
            kinds.DECODE_DIES: self._die,
            kinds.ROUTER_DIES: self._die,
            kinds.RESTART: self._die,
            kinds.CLIENT_LEAVES: self._leave,
            kinds.REDIS_AWAY: self._lose_redis,
            kinds.SLOW_LINK: self._slow_down,
            kinds.CUT_LINK: self._cut,
            kinds.MESSAGES: self._garble_messages,
            kinds.WRITES: self._spoil_writes,
            kinds.STOPPED: self._stop,
            kinds.TICKETS: self._try_tickets,
            kinds.DRAIN: self._drain,
        }

    async def strike(self, fault: Fault) -> None:
        """From its time to its end."""
        await self._at(self._begun_s + fault.at_s)
        for phase in self._world.witness.phases():
            self._world.hits[fault.kind, phase] += 1
        story.warning("-- %s %s for %.2f s", fault.kind, fault.target, fault.length_s)
        end_s = fault.at_s + fault.length_s
        if fault.kind != kinds.STOPPED:
            end_s = min(end_s, FAULTS_END_S)
        await self._acts[fault.kind](fault, self._begun_s + end_s)

    async def _at(self, at_s: float) -> None:
        await asyncio.sleep(at_s - self._loop.time())

    async def _until(self, end_s: float) -> None:
        while not self._is_felt_by_nobody() and self._loop.time() < end_s:
            await self._at(min(end_s, self._loop.time() + LOOK_S))

    def _is_felt_by_nobody(self) -> bool:
        """Then it may end, and the seed with it."""
        return self._world.is_idle() and not self._world.schedule.plays_out

    async def _die(self, fault: Fault, end_s: float) -> None:
        """Of workers that write half die while they do."""
        length_s = end_s - self._loop.time()
        if fault.target in self._world.workers and self._rng.random() < 0.5:
            await self._fabric.write_of(self._world.process(fault.target), LONGEST_WAIT_S)
        end_s = min(self._loop.time() + length_s, max(end_s, self._begun_s + FAULTS_END_S))
        if self._crash(fault.target):
            await self._until(end_s)
            self._restart(fault.target)

    def _crash(self, name: str) -> bool:
        process, worker = self._world.process(name), self._world.workers.get(name)
        if not process.is_alive or (worker is not None and not worker.is_up):  # it has yet to begin this life
            return False
        if worker is not None:
            self._world.witness.count(worker)
        self._network.crash(process)
        self._fabric.crash(process)
        return True

    def _restart(self, name: str) -> None:
        if name in self._world.workers:
            self._world.start_worker(self._world.workers[name].plan)
        else:
            self._world.start_router(name)

    async def _leave(self, fault: Fault, end_s: float) -> None:
        client = self._world.clients.get(fault.target)
        if client is None or client.end:
            return
        if self._rng.random() < 0.5:
            assert client.task is not None
            client.task.cancel()
        else:
            client.end = "left"
            self._network.crash(client.process)

    async def _lose_redis(self, fault: Fault, end_s: float) -> None:
        self._store.is_away = True
        await self._until(end_s)
        self._store.come_back(empty=self._rng.random() < 0.5)

    async def _slow_down(self, fault: Fault, end_s: float) -> None:
        self._network.slow_s[fault.target] = self._rng.choice((0.1, 0.5))
        await self._until(end_s)
        self._network.slow_s.pop(fault.target, None)

    async def _cut(self, fault: Fault, end_s: float) -> None:
        one, other = fault.target.split("|")
        self._network.block(one, other)
        await self._until(end_s)
        self._network.heal(one, other)

    async def _garble_messages(self, fault: Fault, end_s: float) -> None:
        self._network.mischief = self._rng.choice((0.03, 0.2))
        await self._until(end_s)
        self._network.mischief = 0.0

    async def _spoil_writes(self, fault: Fault, end_s: float) -> None:
        self._fabric.faults = self._rng.choice((0.1, 0.5))
        await self._until(end_s)
        self._fabric.faults = 0.0

    async def _stop(self, fault: Fault, end_s: float) -> None:
        process = self._world.process(fault.target)
        if process.is_alive and not process.is_stopped:
            self._network.stop(process)
            await self._until(end_s)
            self._loop.go_on(process)

    async def _drain(self, fault: Fault, end_s: float) -> None:
        """It is told to stop, and is gone some time after."""
        worker = self._world.workers[fault.target]
        if worker.is_up and worker.process.is_alive and not worker.process.is_stopped:
            self._loop.call_soon(worker.drain, context=worker.process.context)
            await self._until(end_s)
            if worker.process.is_alive and self._crash(fault.target):
                self._restart(fault.target)

    async def _try_tickets(self, fault: Fault, end_s: float) -> None:
        while self._loop.time() < end_s and not self._is_felt_by_nobody():
            await asyncio.sleep(self._rng.uniform(0.0, 0.2))
            if self._network.begun:
                await self._loop.spawn(Process("rogue"), self._try_a_ticket(*self._rng.choice(self._network.begun)))

    async def _try_a_ticket(self, address: str, data: bytes) -> None:
        """One that has let a writer in already, as it is or with another's blocks, where it was used or elsewhere."""
        begin = worker_pb2.HandoffRequest.FromString(data)
        if not begin.HasField("begin"):
            return  # it was lost, and this came first
        if self._rng.random() < 0.5:
            ticket = worker_pb2.Ticket.FromString(begin.begin.ticket.ticket)
            ticket.reservation_id, _, number = ticket.reservation_id.rpartition("/")
            ticket.reservation_id += f"/{int(number) + 1}"
            begin.begin.ticket.ticket = ticket.SerializeToString()
        if self._rng.random() < 0.3:
            address = f"{self._rng.choice(list(self._world.workers))}:{PORT}"
        call = worker_pb2_grpc.WorkerStub(channel(address, KEY)).Handoff(timeout=1.0)
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.write(begin)
            reply = await call.read()
            if reply is not grpc.aio.EOF and reply.HasField("accepted"):
                self._world.violated(f"a ticket that was used before, or forged, was accepted at {address}")
        call.cancel()
