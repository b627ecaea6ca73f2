"""Blocks out to tiers and back in, where the device's memory is not what threads copy from: a device in miniature."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from scheduler.config import SchedulerConfig
from tests.support.memory_worker import make_worker, model_layout
from worker.lanes import Lanes
from worker.tiers import HostTier
from worker.warming import Warming

BLOCKS, SIZE = 12, 4
WHOLE = model_layout(num_layers=3, heads=2, block_tokens=SIZE)
TOKENS = [*range(20, 39)]  # four full blocks, and three tokens


class Device:
    """As a Core of two ranks in each of `dp` groups: `memory` is what engines read and write."""

    def __init__(self, dp: int = 1) -> None:
        made = make_worker(WHOLE, tp=2, dp=dp, num_blocks=BLOCKS)
        self.ranks = [
            SimpleNamespace(kv=rank.kv, group=rank.group, number=number, landing=torch.from_numpy(view.copy()))
            for number, (rank, view) in enumerate(zip(made.ranks, made.views, strict=True))
        ]
        self.memory = [torch.zeros_like(rank.landing) for rank in self.ranks]
        self.scheduler = Lanes.of(
            SchedulerConfig(BLOCKS, SIZE, max_step_tokens=64, max_sequences=4, max_context_tokens=40, group=group)
            for group in range(dp)
        )
        self.record = SimpleNamespace(kv_layout=WHOLE)
        self.loop = SimpleNamespace(lock=threading.RLock(), wake=lambda: None)
        self.meter = SimpleNamespace(tier_bytes=lambda *_: None, tier_hit=lambda *_: None)

    def ranks_of(self, group: int) -> tuple[Any, ...]:
        return tuple(rank for rank in self.ranks if rank.group == group)

    def unhold(self, group: int, blocks: Sequence[int]) -> None:
        with self.loop.lock:
            self.scheduler.unhold(group, blocks)

    async def stage_out(self, ranks: Sequence[Any], blocks: Sequence[int], layers: range) -> None:
        assert layers == range(WHOLE.num_layers)
        await asyncio.sleep(0.001)
        for rank in ranks:
            rank.landing[list(blocks)] = self.memory[rank.number][list(blocks)]

    async def stage_in(self, ranks: Sequence[Any], blocks: Sequence[int]) -> None:
        await asyncio.sleep(0.001)
        for rank in ranks:
            self.memory[rank.number][list(blocks)] = rank.landing[list(blocks)]

    def compute(self, group: int, seed: int) -> list[torch.Tensor]:
        """The full blocks of TOKENS, published and let go; what each rank of the group holds of them."""
        lane = self.scheduler.schedulers[group]
        with self.loop.lock:
            blocks = lane.pool.allocate(len(TOKENS) // SIZE)
            for rank in self.ranks_of(group):
                filled = self.memory[rank.number][blocks]
                drawn = torch.randint(0, 256, filled.shape, generator=torch.Generator().manual_seed(seed))
                self.memory[rank.number][blocks] = drawn.to(torch.uint8)
            lane.prefix.publish(lane.prefix.hashes(TOKENS), blocks, 0, len(blocks))
            lane.pool.release(blocks)
        return [self.memory[rank.number][blocks].clone() for rank in self.ranks_of(group)]

    def evict(self) -> None:
        with self.loop.lock:
            for group, lane in enumerate(self.scheduler.schedulers):
                blocks = lane.pool.allocate(BLOCKS)
                for rank in self.ranks_of(group):
                    rank.landing[:] = self.memory[rank.number][:] = 0xEE
                lane.pool.release(blocks)

    def held(self, group: int) -> tuple[int, list[torch.Tensor]]:
        """(Blocks of TOKENS that the prefix cache finds, what the ranks' memories hold of them)."""
        lane = self.scheduler.schedulers[group]
        blocks = lane.prefix.match(TOKENS)
        lane.pool.release(blocks)
        return len(blocks), [self.memory[rank.number][blocks] for rank in self.ranks_of(group)]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.002)


def assert_at_rest(device: Device, warming: Warming) -> None:
    assert set(warming.live().values()) == {0}
    for lane in device.scheduler.schedulers:
        lane.pool.check({})


async def test_what_comes_back_is_on_the_device_before_it_is_found() -> None:
    device = Device(dp=2)
    warming = Warming(device, [HostTier(1 << 20)])  # type: ignore[arg-type]
    expected = device.compute(group=1, seed=1)
    await until(lambda: warming.totals()["tier_stored_bytes"] == 4 * WHOLE.block_bytes)
    device.evict()
    assert [device.held(group)[0] for group in (0, 1)] == [0, 0]
    await warming.warm(TOKENS, "")
    counts = [device.held(group)[0] for group in (0, 1)]
    assert sorted(counts) == [0, 4], "into the lane where the sequence will be"
    for found, wanted in zip(device.held(counts.index(4))[1], expected, strict=True):
        assert torch.equal(found, wanted)
    assert warming.totals()["host_tier_hits"] == 4
    await warming.warm(TOKENS, "")
    await warming.warm(TOKENS, "another adapter")
    await warming.warm(TOKENS[:SIZE], "")  # its last token is left to compute, so that it needs no block
    assert warming.totals()["host_tier_hits"] == 4
    await until(lambda: not any(warming.live().values()))
    assert_at_rest(device, warming)
    await warming.close()


async def test_only_what_is_whole_comes_back_and_the_rest_is_free() -> None:
    """The third block is not what it should be: those before it are prefix, those behind it nobody's."""
    device = Device()
    tier = HostTier(1 << 20)
    warming = Warming(device, [tier])  # type: ignore[arg-type]
    device.compute(group=0, seed=2)
    await until(lambda: warming.totals()["tier_stored_bytes"] == 4 * WHOLE.block_bytes)
    third = device.scheduler.schedulers[0].prefix.hashes(TOKENS)[2]
    tier._contents[third] = tier._contents[third][:-1]
    device.evict()
    await warming.warm(TOKENS, "")
    assert device.held(0)[0] == 2
    await until(lambda: not any(warming.live().values()))
    assert_at_rest(device, warming)
    await warming.close()


async def test_it_takes_no_more_room_than_there_is_and_outlives_who_asked() -> None:
    device = Device()
    warming = Warming(device, [HostTier(1 << 20)])  # type: ignore[arg-type]
    device.compute(group=0, seed=3)
    await until(lambda: warming.totals()["tier_stored_bytes"] == 4 * WHOLE.block_bytes)
    device.evict()
    pool = device.scheduler.schedulers[0].pool
    others = pool.allocate(BLOCKS - 3)
    asked = asyncio.create_task(warming.warm(TOKENS, ""))
    await asyncio.sleep(0)
    asked.cancel()  # the client leaves; what a thread fills is not given away
    await asyncio.wait([asked])
    await until(lambda: not any(warming.live().values()))
    assert device.held(0)[0] == 3
    pool.release(others)
    assert_at_rest(device, warming)
    await warming.close()
