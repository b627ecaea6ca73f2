"""Blocks in and out of the tiers, beside the engine's steps.

    out   a full block became prefix content, or was found ──▶ held, copied in a thread, released       (keep)
    in    before a sequence joins, or reserves: blocks of its prompt that the prefix cache lacks and a tier has
          ──▶ spare blocks are taken, filled in a thread, published; the sequence finds them as any prefix   (warm)

What is copied out is immutable, for it is held; what is filled is nobody else's until it is published. An evicted block
was copied when it became full, so that eviction costs nothing.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from scheduler.batch import Scheduler
from service import logs
from spec.errors import LegatoError
from worker.tiers import Tier

if TYPE_CHECKING:
    from worker.core import Core, CoreRank

logger = logs.get(__name__)

BATCH_BYTES = 32 << 20  # copied at a time, so that few blocks are held
BATCH_SHARE = 16  # of the KV memory at most one block in so many is held for it
WARM_FOR_S = 2.0  # a request waits so long for its prefix, and computes what is not there by then


class Warming:
    """Owned by the process; `start` in its event loop, before the engine loop runs."""

    def __init__(self, core: Core, tiers: Sequence[Tier]) -> None:
        self._core, self._tiers = core, tuple(tiers)
        self._block_bytes = sum(rank.kv.layout.block_bytes for rank in core.ranks_of(0))
        pool = core.scheduler.schedulers[0].pool
        self._batch_blocks = max(1, min(BATCH_BYTES // self._block_bytes, pool.num_blocks // BATCH_SHARE))
        most = pool.num_blocks * len(core.scheduler.schedulers)
        self._used: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=most)  # of a group, not looked at
        self._is_told = False
        self._totals: collections.Counter[str] = collections.Counter()
        self._event_loop = asyncio.get_running_loop()
        self._something = asyncio.Event()
        self._stopping = False
        self._copying = 0  # blocks held to be copied out
        self._one_at_a_time = asyncio.Lock()  # two requests of one prefix do not both fetch it
        self._warming: set[asyncio.Task[None]] = set()
        self._pool = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix="kv-tiers")
        self._keeping = asyncio.create_task(self._keep())
        for group, scheduler in enumerate(core.scheduler.schedulers):
            scheduler.prefix.on_use = functools.partial(self._on_use, group)

    def live(self) -> dict[str, int]:
        """What is as at start when nothing runs (promise P3)."""
        return {"tiers.copying": self._copying, "tiers.warming": len(self._warming)}

    def totals(self) -> dict[str, int]:
        """What only grows: blocks brought back by each tier, bytes in and out, contents that were wrong."""
        found = {f"{tier.name}_tier_hits": self._totals[tier.name] for tier in self._tiers}
        found |= {f"tier_{what}_bytes": self._totals[what] for what in ("stored", "loaded")}
        return found | {"tier_dropped": sum(tier.dropped for tier in self._tiers)}

    async def close(self) -> None:
        """What is being copied is copied to its end."""
        self._stopping = True
        self._something.set()
        await asyncio.wait([self._keeping, *self._warming])
        self._pool.shutdown(wait=True)
        for tier in self._tiers:
            tier.close()

    # ---- out -------------------------------------------------------------------------------------------------------

    def _on_use(self, group: int, contents: Sequence[bytes]) -> None:
        """Under the engine loop's lock, in any thread."""
        self._used.extend((group, content) for content in contents)
        if not self._is_told:
            self._is_told = True
            self._event_loop.call_soon_threadsafe(self._something.set)

    async def _keep(self) -> None:
        try:
            await self._keep_all()
        except Exception:
            logger.exception("no more KV blocks are copied out")

    async def _keep_all(self) -> None:
        while not self._stopping:
            await self._something.wait()
            self._something.clear()
            self._is_told = False
            while self._used and not self._stopping:
                if (batch := self._lacking()) is not None:
                    await self._copy_out(*batch)

    def _lacking(self) -> tuple[int, list[bytes]] | None:
        """The next contents of one group that a tier lacks; those that are in every tier are the last to go there."""
        group, lacking = -1, list[bytes]()
        while self._used and len(lacking) < self._batch_blocks:
            other_group, content = self._used.popleft()
            if lacking and other_group != group:
                self._used.appendleft((other_group, content))
                break
            if sum(tier.use(content) for tier in self._tiers) < len(self._tiers):  # each is told
                group = other_group
                lacking.append(content)
        return (group, lacking) if lacking else None

    async def _copy_out(self, group: int, contents: Sequence[bytes]) -> None:
        core, pool = self._core, self._core.scheduler.schedulers[group].pool
        with core.loop.lock:
            found = {content: block for content in contents if (block := pool.find(content)) is not None}
            blocks = pool.hold(list(found.values()))
        self._copying += len(blocks)
        ranks = core.ranks_of(group)
        try:
            await core.stage_out(ranks, blocks, range(core.record.kv_layout.num_layers))
            await self._event_loop.run_in_executor(self._pool, self._store, ranks, found)
        except LegatoError as error:  # a rank is lost, and the worker with it
            logger.warning("KV blocks were not copied out: %s", error)
        finally:
            core.unhold(group, blocks)
            self._copying -= len(blocks)

    def _store(self, ranks: Sequence[CoreRank], found: dict[bytes, int]) -> None:
        for content_hash, block in found.items():
            content = torch.cat([_bytes_of(rank, block) for rank in ranks])
            stored = sum(tier.store(content_hash, content) for tier in self._tiers)
            self._totals["stored"] += stored * content.numel()
            self._core.meter.tier_bytes("stored", stored * content.numel())

    # ---- in --------------------------------------------------------------------------------------------------------

    async def warm(self, token_ids: Sequence[int], adapter: str) -> None:
        """Until the prefix cache holds what tiers have of these tokens' prefix, as far as there is room and time."""
        task = asyncio.create_task(self._warm(token_ids, adapter))
        self._warming.add(task)
        task.add_done_callback(self._warming.discard)
        await asyncio.shield(task)  # nobody frees blocks that a thread fills

    async def _warm(self, token_ids: Sequence[int], adapter: str) -> None:
        core, until_s = self._core, time.monotonic() + WARM_FOR_S
        lane = core.scheduler.schedulers[0]
        if len(core.scheduler.schedulers) > 1:
            with core.loop.lock:
                lane = core.scheduler.lightest(token_ids, adapter)
        size = lane.config.block_tokens
        hashes = lane.prefix.hashes(token_ids, adapter)[: max(len(token_ids) - 1, 0) // size]
        if not self._is_worth_it(lane, hashes):
            return
        async with self._one_at_a_time:
            held: list[int] = []  # blocks of the prefix from its beginning on, a reference on each
            try:
                while len(held) < len(hashes) and time.monotonic() < until_s:
                    if not await self._lengthen(lane, hashes, held):
                        break
            except LegatoError as error:
                logger.warning("a prefix was not brought back: %s", error)
            finally:
                with core.loop.lock:
                    lane.pool.release(held)
                core.loop.wake()

    def _is_worth_it(self, lane: Scheduler, hashes: Sequence[bytes]) -> bool:
        with self._core.loop.lock:
            known = lane.prefix.count(hashes)
        return known < len(hashes) and self._has(hashes[known])

    def _has(self, content: bytes) -> bool:
        return any(tier.use(content) for tier in self._tiers)

    async def _lengthen(self, lane: Scheduler, hashes: Sequence[bytes], held: list[int]) -> bool:
        """By the blocks that are known here and a batch from the tiers. False: that is all there is."""
        core, pool = self._core, lane.pool
        with core.loop.lock:
            while len(held) < len(hashes) and (block := pool.find(hashes[len(held)])) is not None:
                held += pool.hold([block])
            first, end = len(held), len(held)
            most = min(len(hashes), first + self._batch_blocks, first + lane.spare_blocks())
            while end < most and pool.find(hashes[end]) is None and self._has(hashes[end]):
                end += 1
            held += pool.allocate(end - first)
        if end == first:
            return False
        ranks, wanted = core.ranks_of(lane.config.group), list(zip(hashes[first:end], held[first:], strict=True))
        filled = await self._event_loop.run_in_executor(self._pool, self._fill, ranks, wanted)
        await core.stage_in(ranks, held[first : first + filled])
        with core.loop.lock:
            lane.prefix.publish(hashes, held, first, first + filled)
        self._totals["loaded"] += filled * self._block_bytes
        self._core.meter.tier_bytes("loaded", filled * self._block_bytes)
        return first + filled == end

    def _fill(self, ranks: Sequence[CoreRank], wanted: Sequence[tuple[bytes, int]]) -> int:
        """How many blocks were filled, in order."""
        for count, (content_hash, block) in enumerate(wanted):
            if (content := self._load(content_hash)) is None:
                return count
            parts = torch.split(content, [rank.kv.layout.block_bytes for rank in ranks])
            for rank, part in zip(ranks, parts, strict=True):
                _bytes_of(rank, block).copy_(part)
        return len(wanted)

    def _load(self, content_hash: bytes) -> torch.Tensor | None:
        for tier in self._tiers:
            content = tier.load(content_hash)
            if content is not None and content.numel() == self._block_bytes:
                self._totals[tier.name] += 1
                self._core.meter.tier_hit(tier.name)
                return content
        return None


def _bytes_of(rank: CoreRank, block: int) -> torch.Tensor:
    """A block in the rank's landing memory: a view, uint8 [block_bytes]."""
    return rank.landing[block].view(-1).view(torch.uint8)
