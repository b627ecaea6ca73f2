"""One worker's working parts: model, KV memory, transports, engine, scheduler, loop. worker/build.py composes them.

transports ──register─▶ KV memory ──▶ engine ◀─┬─execute── loop ──plan, commit──▶ scheduler ◀──blocks── reservations
     ▲                      │        ranks ◀───┘                                   (decode only)
     └── peers write ───────┘
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from engine.engine import Engine
from engine.grammar import Grammars, Matcher
from kvtransfer.plan import common
from kvtransfer.routes import RankMemory
from kvtransfer.transport import Region, Transport
from legato.v1 import worker_pb2
from legato.v1.rank_pb2 import RankCommand, RankReport
from service.config import WorkerConfig
from spec.constraint import Constraint
from spec.sampling import SamplingParams
from worker.executor import StepExecutor
from worker.kv_region import copy_blocks
from worker.lanes import LaneReservations, Lanes
from worker.loop import EngineLoop
from worker.meter import Meter
from worker.rank_setup import keepers_of
from worker.ranks import Ranks
from worker.tiers import Tier
from worker.warming import Warming

# Of a constraint, of which a router's sandbox took less than one; the vocabulary is read first.
COMPILE_TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class CoreRank(RankMemory):
    """One rank of this worker, as hand-overs see it."""

    # KV memory as transports see it, [num_blocks, layers, planes, heads, block_tokens, row]; where the rank computes on
    # a GPU it is a mirror on the host. Of a rank on another host it is not here: there are no blocks in it.
    landing: torch.Tensor = dataclasses.field(kw_only=True)
    number: int = dataclasses.field(default=0, kw_only=True)


@dataclasses.dataclass(slots=True)
class Core:
    """Owned by the process; made by build_core(), ended by close()."""

    config: WorkerConfig
    cluster_key: bytes
    record: worker_pb2.WorkerRecord
    ranks: tuple[CoreRank, ...]  # by number
    engine: Engine  # of rank 0, in this process
    grammars: Grammars  # of the same
    others: Ranks | None  # None: there is one rank
    executor: StepExecutor
    landings_are_kv: bool  # what transports see is what engines use
    transports: dict[str, Transport]
    regions: dict[str, Region]
    scheduler: Lanes
    reservations: LaneReservations
    digest_pool: concurrent.futures.ThreadPoolExecutor
    meter: Meter
    tiers: tuple[Tier, ...] = ()
    loop: EngineLoop = dataclasses.field(init=False)
    warming: Warming | None = dataclasses.field(init=False, default=None)  # where there are tiers

    def ranks_of(self, group: int) -> tuple[CoreRank, ...]:
        """Of one group (among dp): they hold the same blocks, each its layers and heads."""
        return tuple(rank for rank in self.ranks if rank.group == group)

    def hold(self, group: int, block_table: tuple[int, ...]) -> None:
        """Their content stays until unhold(), whatever happens to the sequence that owns them."""
        with self.loop.lock:
            self.scheduler.hold(group, block_table)

    def unhold(self, group: int, block_table: tuple[int, ...]) -> None:
        with self.loop.lock:
            self.scheduler.unhold(group, block_table)
        self.loop.wake()  # somebody may wait for these blocks

    @property
    def num_hosts(self) -> int:
        return 1 + max(rank.host for rank in self.ranks)

    async def has_links(self, transport: str, links: Sequence[worker_pb2.HandoffRequest.Link]) -> list[bool]:
        """Of each what has_link() of that transport says on its host. Raises WorkerLost when a rank is gone."""
        asked = [
            self._ask_keeper(link.host, has_link=RankCommand.HasLink(transport=transport, link_id=link.link_id))
            for link in links
            if link.host
        ]
        told = iter(await asyncio.gather(*map(asyncio.wrap_future, asked)))
        here = self.transports[transport]
        return [next(told).has_link if link.host else here.has_link(link.link_id) for link in links]

    def cut(self, transport: str, links: Sequence[worker_pb2.HandoffRequest.Link]) -> None:
        """As Transport.cut() does, of each on its host; waits. Raises as that does, and WorkerLost when a rank is
        gone."""
        asked = [
            self._ask_keeper(link.host, cut_link=RankCommand.CutLink(transport=transport, link_id=link.link_id))
            for link in links
            if link.host
        ]
        for link in links:
            if not link.host:
                self.transports[transport].cut(link.link_id)
        for each in asked:
            each.result()

    def _ask_keeper(self, host: int, **command: Any) -> concurrent.futures.Future[RankReport.Answered]:
        assert self.others is not None
        return self.others.ask(keepers_of([rank.host for rank in self.ranks])[host], RankCommand(**command))

    def compile(self, constraint: Constraint) -> concurrent.futures.Future[Matcher]:
        """On every rank, in threads beside the steps; once, however often it is asked for."""
        if self.others is not None:
            self.others.compile(constraint)
        return self.grammars.compiled(constraint)

    async def prepare(self, params: SamplingParams) -> None:
        """Before a sequence joins the scheduler: its constraint is compiled. Raises InvalidParameter."""
        if params.constraint is None:
            return
        compiling = asyncio.wrap_future(self.compile(params.constraint))
        try:
            async with asyncio.timeout(COMPILE_TIMEOUT_S):
                await asyncio.shield(compiling)
        except TimeoutError:
            raise params.constraint.refusal(f"was not compiled within {COMPILE_TIMEOUT_S:g} s") from None

    async def warm(self, token_ids: Sequence[int], adapter: str) -> None:
        """Before a sequence of these tokens joins the scheduler or reserves: what tiers hold of its prefix is brought
        into the prefix cache."""
        if self.warming is not None:
            await self.warming.warm(token_ids, adapter)

    async def stage_out(self, ranks: Sequence[CoreRank], block_ids: Sequence[int], layers: range) -> None:
        """Before these ranks' blocks are sent: brings the model's `layers` of them into their landing memory. Nothing
        to do where that is the engine's own. Raises WorkerLost when a rank is gone."""
        if not self.landings_are_kv:
            await self._stage(ranks, block_ids, layers, to_device=False)

    async def stage_in(self, ranks: Sequence[CoreRank], block_ids: Sequence[int]) -> None:
        """After blocks landed and were found right: brings them into the ranks' own memory. Raises WorkerLost."""
        if not self.landings_are_kv:
            layers = range(max(rank.kv.layers.stop for rank in ranks))
            staging = asyncio.ensure_future(self._stage(ranks, block_ids, layers, to_device=True))
            try:
                await asyncio.shield(staging)
            finally:
                await asyncio.wait([staging])  # nobody frees these blocks while they are written

    async def _stage(
        self, ranks: Sequence[CoreRank], block_ids: Sequence[int], layers: range, *, to_device: bool
    ) -> None:
        copying: list[asyncio.Future[Any]] = []
        for rank in ranks:
            held = common(layers, rank.kv.layers)
            own = range(held.start - rank.kv.layers.start, held.stop - rank.kv.layers.start)
            if not own:
                continue
            if rank.number == 0:
                event_loop = asyncio.get_running_loop()
                landing, memory = self.ranks[0].landing, self.engine.kv.tensor
                arguments = landing, memory, tuple(block_ids), own, to_device
                copying.append(event_loop.run_in_executor(self.digest_pool, copy_blocks, *arguments))
            else:
                assert self.others is not None
                copy = RankCommand.Copy(
                    to_device=to_device, block_ids=block_ids, first_layer=own.start, num_layers=len(own)
                )
                copying.append(asyncio.wrap_future(self.others.ask(rank.number, RankCommand(copy=copy))))
        await asyncio.gather(*copying)

    def load(self) -> worker_pb2.WorkerLoad:
        with self.loop.lock:
            load, totals = self.scheduler.load(), self.scheduler.totals()
            reserved, quarantined = self.reservations.reserved_blocks(), self.reservations.quarantined_blocks()
        return worker_pb2.WorkerLoad(
            waiting_requests=load.waiting,
            running_requests=load.running,
            waiting_tokens=load.waiting_tokens,
            free_blocks=load.free_blocks,
            reserved_blocks=reserved,
            steps=totals["steps"],
            computed_tokens=totals["computed_tokens"],
            generated_tokens=totals["generated_tokens"],
            preemptions=totals["preemptions"],
            transferred_bytes=sum(transport.counts()["written_bytes"] for transport in self.transports.values()),
            refused_handoffs=self.meter.refused_handoffs,
            moved_sequences=self.meter.moved_sequences,
            quarantined_blocks=quarantined,
        )

    def live(self) -> dict[str, int]:
        """Every count that must be as at start when nothing runs (promise P3)."""
        with self.loop.lock:
            counts = {f"scheduler.{name}": count for name, count in self.scheduler.counts().items()}
            counts |= {f"reservations.{name}": count for name, count in self.reservations.counts().items()}
        for name, transport in self.transports.items():
            moving = transport.counts()
            counts |= {f"{name}.{key}": moving[key] for key in ("regions", "transfers")}
        return counts if self.warming is None else counts | self.warming.live()

    def all_totals(self) -> dict[str, int]:
        """What only grows."""
        with self.loop.lock:
            totals = self.scheduler.totals() | self.executor.totals()
        totals["fetched_tokens"] = self.meter.fetched_tokens
        return totals if self.warming is None else totals | self.warming.totals()

    def check(self) -> None:
        """Asserts every invariant; O(everything), for tests."""
        with self.loop.lock:
            self.scheduler.check()
            self.reservations.check()

    def close(self) -> None:
        self.loop.stop()
        if self.others is not None:
            self.others.close()
        self.engine.groups.close()
        self.digest_pool.shutdown(wait=True)
        self.grammars.close()
        for transport in self.transports.values():
            transport.close()
