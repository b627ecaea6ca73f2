"""What is looked at while a world runs, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvtransfer.transport import Piece
from scheduler.lifetime import Stage
from scheduler.plan import StepPlan
from scheduler.reservation import Entry, ReservationStage
from tests.simulation.cluster import Worker
from tests.simulation.transport import SimulatedTransport, Write

if TYPE_CHECKING:
    from tests.simulation.world import World


class Witness:
    """Of one world. It reads what the product keeps to itself, and touches nothing."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._owners: dict[SimulatedTransport, Worker] = {}

    def note(self, worker: Worker) -> None:
        """It has begun a new life."""
        (transport,) = worker.core.transports.values()
        assert isinstance(transport, SimulatedTransport)
        self._owners[transport] = worker

    def phases(self) -> list[str]:
        """In which phase each request is that has not ended."""
        found = {client.plan.name: "placed" for client in self._world.clients.values() if not client.end}
        for worker in self._world.workers.values():
            if worker.plan.role == "decode" and worker.process.is_alive:
                self._phases_at(worker, found)
        for name, client in self._world.clients.items():
            if name in found and len(client.tokens) == len(client.truth.answer):
                found[name] = "finishing"
        return list(found.values())

    def _phases_at(self, worker: Worker, found: dict[str, str]) -> None:
        reservations: dict[str, Entry] = {
            entry.reservation.sequence_id: entry
            for each in worker.core.reservations._each
            for entry in each._live.values()
        }
        for sequence_id in worker.pool._placements.placed:  # type: ignore[attr-defined]
            name = sequence_id.partition("-")[0]
            if name not in found:
                continue
            if (entry := reservations.get(sequence_id)) is not None:
                reserved = "reserved" if entry.stage is ReservationStage.RESERVED else "prefilling"
                moving = entry.landed_tokens > entry.reservation.held_tokens
                found[name] = "moving" if moving else reserved
            elif (running := worker.core.scheduler.find(sequence_id)) is not None:
                sequence = running[1]
                began = sequence.drawn_here > 0 or sequence.stage is not Stage.RUNNING
                found[name] = "decoding" if began else "handed over"

    def posting(self, owner: SimulatedTransport, write: Write) -> list[tuple[str, int, int, int]]:
        worker = self._owners.get(owner)
        if worker is None or not worker.process.is_alive:
            return []
        marks = []
        for group, block in sorted({worker.memory.block_of(piece.target_offset) for piece in write.pieces}):
            entry = self._writable(worker, group, block)
            if entry is None:
                self._world.violated(f"a write was posted to block {block} of {worker.plan.worker_id}, not for it")
                continue
            generation = worker.core.scheduler.schedulers[group].pool.generation(block)
            marks.append((entry.reservation.reservation_id, group, block, generation))
        return marks

    def _writable(self, worker: Worker, group: int, block: int) -> Entry | None:
        for entry in worker.core.reservations._each[group]._live.values():
            if (
                block in entry.reservation.block_ids[entry.settled_blocks :]
                and entry.stage is not ReservationStage.RESERVED
            ):
                return entry
        return None

    def landing(self, owner: SimulatedTransport, write: Write, pieces: Sequence[Piece]) -> None:
        worker = self._owners[owner]
        core = worker.core
        for reservation_id, group, block, generation in write.mark:
            pool = core.scheduler.schedulers[group].pool
            if reservation_id not in core.reservations._each[group]._live or pool.generation(block) != generation:
                self._world.violated(
                    f"a write landed in block {block} of {worker.plan.worker_id} that was given away: {reservation_id}"
                )

    def stepping(self, worker: Worker, plan: StepPlan) -> None:
        """What a decode worker computes has a reader, or had one when the step began."""
        if worker.plan.role == "decode":
            for piece in plan.slices:
                if piece.sequence_id not in worker.pool._placements.placed:  # type: ignore[attr-defined]
                    self._world.violated(f"{piece.sequence_id} runs on {worker.plan.worker_id}, which was given up")

    def count(self, worker: Worker) -> None:
        """At the end of its life."""
        done = self._world.done
        done["tokens of prefixes fetched"] += worker.core.meter.fetched_tokens
        done["sequences moved"] += worker.core.meter.moved_sequences
        done["preemptions"] += worker.core.scheduler.totals()["preemptions"]
        if worker.core.warming is not None:
            totals = worker.core.warming.totals()
            done["blocks brought back from tiers"] += sum(
                totals.get(f"{name}_tier_hits", 0) for name in ("host", "disk")
            )
        for each in worker.core.reservations._each:
            self._world.refused.update(each.refused)

    def audit(self, worker: Worker) -> None:
        """What the prefix cache names is what the blocks hold."""
        worker.core.check()
        self.count(worker)
        for group, scheduler in enumerate(worker.core.scheduler.schedulers):
            size = scheduler.config.block_tokens
            for name, truth in self._world.around.truths.items():
                for index, content in enumerate(scheduler.prefix.hashes(truth.tokens, truth.adapter_id)):
                    block = scheduler.pool.find(content)
                    rows = truth.rows[index * size : (index + 1) * size]
                    if block is not None and not worker.memory.holds(group, (block,), 0, rows):
                        self._world.violated(
                            f"{worker.plan.worker_id} caches block {block} as {name}'s, which it is not"
                        )
