"""Chunks that leave in groups of layers bring every byte and digest that whole ones do, and none is told too early."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
from memory_worker import MemoryWorker, make_worker, model_layout

from engine.layer_hook import LayerHook
from kvtransfer.digest import DigestPolicy, HeldDigest
from kvtransfer.memory import Fault, FaultKind, MemoryTransport
from legato.v1 import worker_pb2
from spec.dtype import Dtype
from spec.errors import LegatoError, RequestCancelled
from worker.core import CoreRank
from worker.departures import Departures, Target, Way
from worker.link import Link
from worker.staging import SourceKV, Staging
from worker.watch import StepWatch

WHOLE = model_layout(num_layers=5, heads=4, block_tokens=4, dtype=Dtype.FLOAT16)
STAGES = {1: [range(5)], 2: [range(2), range(2, 5)]}
TOKENS = 27
CHUNKS = (6, 13, 21, 27)  # ends; blocks are partial at most of them
SOURCE_BLOCKS, TARGET_BLOCKS = [8, 1, 5, 0, 7, 2, 6], [3, 9, 0, 7, 1, 8, 2, 5, 4]


class OneWay:
    """One hand-over between two workers' memories. `told` is what the receiver was told, `released` which holds are."""

    def __init__(self, source: MemoryWorker, target: MemoryWorker, transport: MemoryTransport, **options: Any) -> None:
        self.source, self.target, self.transport = source, target, transport
        self.told: list[worker_pb2.HandoffRequest] = []
        self.released: list[int] = []
        self.failed: asyncio.Future[LegatoError] = asyncio.get_running_loop().create_future()
        region = transport.register(source.region.nbytes, memoryview(source.region))
        hosts = options.pop("hosts", 1)  # of the target: the ranks' memory is the same, the regions are not
        theirs = [transport.register(target.region.nbytes, memoryview(target.region)) for _ in range(hosts)]
        target_ranks = tuple(dataclasses.replace(rank, host=number % hosts) for number, rank in enumerate(target.ranks))
        dtype = {2: torch.float16, 4: torch.float32}[WHOLE.dtype.itemsize_bytes]
        ranks = [
            CoreRank(rank.kv, rank.group, rank.offset_bytes, landing=torch.from_numpy(view).view(dtype), number=number)
            for number, (rank, view) in enumerate(zip(source.ranks, source.views, strict=True))
        ]
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        kv = SourceKV(lambda group: ranks, region, transport.register, self.stage_out)
        ticket = worker_pb2.Ticket(
            reservation_id=options.pop("name", "r/1"),
            num_tokens=TOKENS,
            first_token=options.pop("first_token", 0),
            block_ids=TARGET_BLOCKS,
        )
        peers = [transport.connect(transport.address, each.descriptor) for each in theirs]
        links = [options.pop("link", None) or Link() for _ in theirs]
        self.ways = tuple(Way(*each) for each in zip(range(hosts), peers, links, strict=True))
        self.staging = Staging(kv, target.ranks, self.pool)
        self.departures = Departures(
            Target(
                ticket,
                worker_pb2.SignedTicket(),
                target_ranks,
                self.ways,
                "memory",
                5.0,
            ),
            self.staging,
            DigestPolicy(options.pop("share", 1.0)),
            self.pool,
            self.tell,
            self.failed,
        )

    async def stage_out(self, ranks: Sequence[CoreRank], block_ids: Sequence[int], layers: range) -> None:
        pass

    async def tell(self, message: worker_pb2.HandoffRequest) -> None:
        self.told.append(message)

    def begin(self, end: int) -> None:
        self.departures.begin(end, 0, tuple(SOURCE_BLOCKS), lambda: self.released.append(end))

    @property
    def chunks(self) -> list[tuple[int, int]]:
        return [(each.chunk.first_token, each.chunk.num_tokens) for each in self.told if each.HasField("chunk")]


@contextlib.asynccontextmanager
async def linked(
    tps: tuple[int, int] = (1, 1),
    pps: tuple[int, int] = (1, 1),
    dtype: Dtype = WHOLE.dtype,
    faults: dict[int, Fault] | None = None,
    **options: Any,
) -> AsyncIterator[OneWay]:
    theirs = model_layout(num_layers=5, heads=4, block_tokens=3, dtype=dtype)
    source = make_worker(WHOLE, tp=tps[0], layers=STAGES[pps[0]], num_blocks=9, seed=1)
    target = make_worker(theirs, tp=tps[1], layers=STAGES[pps[1]], num_blocks=10, seed=2)
    values = numpy.random.default_rng(5).standard_normal((5, 2, 4, TOKENS, WHOLE.head_dim)).astype(numpy.float16)
    source.fill(values.view(numpy.uint8), SOURCE_BLOCKS)
    transport = MemoryTransport(faults)
    link = OneWay(source, target, transport, **options)
    running = asyncio.create_task(link.departures.run())
    try:
        yield link
    finally:
        link.departures.end()
        async with asyncio.timeout(20):
            await running
        link.pool.shutdown()
        link.staging.release()
        counts = transport.counts()
        transport.close()
    assert (counts["transfers"], counts["regions"]) == (0, 1 + len(link.ways))
    assert sorted(link.released) == sorted(set(link.released)), "a hold is given back once"


async def by_layers(link: OneWay, ends: Sequence[int]) -> None:
    """As a step of each rank tells it, chunk after chunk."""
    for end in CHUNKS:
        link.begin(end)
        watch = StepWatch(
            link.source.ranks, {0: tuple(ends)}, lambda _, layers, end=end: link.departures.reached(end, layers)
        )
        for rank in range(len(link.source.ranks)):
            hook = watch.hook(rank)
            assert hook is not None
            for own_end in hook.ends:
                hook.written(own_end)
                await asyncio.sleep(0)
        link.departures.computed(end)
    link.departures.end()


async def at_once(link: OneWay, ends: Sequence[int]) -> None:
    for end in CHUNKS:
        link.begin(end)
        link.departures.computed(end)
    link.departures.end()


@pytest.mark.parametrize("first_token", [0, 9])
@pytest.mark.parametrize("dtype", [Dtype.FLOAT16, Dtype.FLOAT32], ids=str)
@pytest.mark.parametrize(
    ("tps", "pps", "hosts"),
    [
        ((1, 1), (1, 1), 1),
        ((2, 1), (1, 2), 1),
        ((2, 1), (1, 2), 2),
        ((1, 4), (2, 1), 1),
        ((1, 4), (2, 1), 2),
        ((2, 2), (2, 2), 1),
        ((8, 1), (1, 1), 1),
    ],
    ids=str,
)
async def test_groups_of_layers_bring_the_bytes_and_digests_of_whole_chunks(
    tps: tuple[int, int], pps: tuple[int, int], dtype: Dtype, first_token: int, hosts: int
) -> None:
    found = []
    for drive, ends in ((at_once, ()), (by_layers, (1, 2, 3, 4, 5)), (by_layers, (3, 4, 5))):
        async with linked(tps, pps, dtype, first_token=first_token, hosts=hosts) as link:
            await drive(link, ends)
        assert not link.failed.done(), link.failed.result()
        assert sorted(link.released) == list(CHUNKS)
        starts = itertools.accumulate((count for _, count in link.chunks), initial=first_token)
        assert [first for first, _ in link.chunks] == list(starts)[:-1]
        assert link.departures.stats.sent_tokens == TOKENS - first_token
        chunks = [each.chunk for each in link.told if each.HasField("chunk")]
        for chunk in chunks:
            for rank, view, digest in zip(link.target.ranks, link_views(link), chunk.digests, strict=True):
                held = HeldDigest(rank, view, TARGET_BLOCKS, chunk.first_token, chunk.num_tokens)
                for call in held.counting(range(5)):
                    call()
                assert held.digest() == digest
        found.append((link.target.region.tobytes(), [each.SerializeToString() for each in chunks]))
    assert found[0] == found[1] == found[2]


def link_views(link: OneWay) -> list[torch.Tensor]:
    return [torch.from_numpy(view) for view in link.target.views]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.002)


async def test_layers_leave_before_the_chunk_is_computed_and_are_told_after() -> None:
    async with linked() as link:
        before = link.target.region.copy()
        link.begin(TOKENS)
        await asyncio.sleep(0.02)
        assert (link.target.region == before).all()
        link.departures.reached(TOKENS, 2)
        await until(lambda: bool((link.target.region != before).any()))
        link.departures.reached(TOKENS, 5)
        await asyncio.sleep(0.05)
        assert not link.chunks
        assert not link.released
        link.departures.computed(TOKENS)
        await until(lambda: bool(link.chunks))
        assert link.chunks == [(0, TOKENS)]
        await until(lambda: link.released == [TOKENS])


async def test_a_step_that_fails_is_told_to_nobody() -> None:
    async with linked() as link:
        link.begin(13)
        link.departures.computed(13)
        link.begin(TOKENS)
        link.departures.reached(TOKENS, 3)
        await until(lambda: bool(link.chunks))
        link.failed.set_result(RequestCancelled("the step failed"))
        link.departures.reached(TOKENS, 5)
        link.departures.computed(TOKENS)
    assert link.chunks == [(0, 12)]
    assert sorted(link.released) == [13, TOKENS]


async def test_blocks_are_held_until_what_left_has_landed() -> None:
    async with linked(faults={0: Fault(FaultKind.DELAY, delay_s=0.3)}) as link:
        link.begin(TOKENS)
        link.departures.reached(TOKENS, 3)
        await asyncio.sleep(0.05)
        link.failed.set_result(RequestCancelled("given up"))
        link.departures.end()
        await asyncio.sleep(0.05)
        assert not link.released, "it is still read from"
    assert link.released == [TOKENS]
    assert not link.departures.unproven


async def test_blocks_of_what_never_left_are_given_back_while_others_are_read() -> None:
    async with linked(faults={0: Fault(FaultKind.DELAY, delay_s=0.5)}) as link:
        for end in (13, TOKENS):
            link.begin(end)
        link.departures.reached(13, 5)
        await asyncio.sleep(0.05)
        link.failed.set_result(RequestCancelled("given up"))
        await until(lambda: link.released == [TOKENS])
    assert link.released == [TOKENS, 13]


@pytest.mark.parametrize("kind", [FaultKind.FAIL, FaultKind.LOSE_PEER])
async def test_a_transfer_that_fails_leaves_the_hand_over_unproven(kind: FaultKind) -> None:
    async with linked(faults={1: Fault(kind)}) as link:
        await by_layers(link, (2, 5))
    assert link.failed.done()
    assert [way.host for way in link.departures.unproven] == [0]
    assert sorted(link.released) == list(CHUNKS)


@pytest.mark.parametrize(("share", "digested"), [(0.0, 0), (0.5, 2), (1.0, 4)])
async def test_a_share_of_the_chunks_is_digested(share: float, digested: int) -> None:
    async with linked(share=share) as link:
        await by_layers(link, (2, 5))
    chunks = [each.chunk for each in link.told if each.HasField("chunk")]
    with_digests = [bool(chunk.digests) for chunk in chunks]
    assert sum(with_digests) == digested
    assert with_digests == [DigestPolicy(share).covers("r/1", chunk.first_token) for chunk in chunks]


def test_a_group_has_reached_what_all_its_ranks_have_written() -> None:
    worker = make_worker(WHOLE, tp=2, layers=STAGES[2], dp=2)
    told: list[tuple[int, int]] = []
    watch = StepWatch(worker.ranks, {1: (1, 4, 5)}, lambda group, layers: told.append((group, layers)))
    assert watch.hook(0) is None, "its group is not listened to"
    first, second = (number for number, rank in enumerate(worker.ranks) if rank.group == 1 and not rank.kv.layers.start)
    behind = [number for number, rank in enumerate(worker.ranks) if rank.group == 1 and rank.kv.layers.start]
    hooks: dict[int, LayerHook] = {rank: hook for rank in (first, second, *behind) if (hook := watch.hook(rank))}
    assert [hooks[rank].ends for rank in (first, *behind)] == [(1, 2), (2, 3), (2, 3)]
    hooks[first].written(1)
    assert told == []
    hooks[second].written(2)
    assert told == [(1, 1)]
    hooks[behind[0]].written(3)
    hooks[first].written(2)
    assert told == [(1, 1), (1, 2)]
    hooks[behind[1]].written(2)
    hooks[behind[1]].written(3)
    assert told == [(1, 1), (1, 2), (1, 4), (1, 5)]


async def test_layers_are_told_as_landed_once_each_host_has_them() -> None:
    """The writes alternate between the hosts; the first to the second one is slow."""
    slow = {1: Fault(FaultKind.DELAY, delay_s=0.3)}
    async with linked(tps=(1, 4), faults=slow, hosts=2) as link:
        link.begin(TOKENS)
        link.departures.reached(TOKENS, 3)
        await asyncio.sleep(0.05)
        assert not link.told
        await until(lambda: bool(link.told))
        assert [each.landed.end_layer for each in link.told] == [3]
        link.departures.computed(TOKENS)
        link.departures.end()


async def test_a_write_to_one_of_two_hosts_that_fails_leaves_that_one_unproven() -> None:
    async with linked(tps=(1, 4), faults={1: Fault(FaultKind.FAIL)}, hosts=2) as link:
        await by_layers(link, (2, 5))
    assert link.failed.done()
    assert [way.host for way in link.departures.unproven] == [1]
    assert sorted(link.released) == list(CHUNKS)
    assert not link.chunks


async def test_layers_are_told_as_they_land_for_the_digest_and_the_chunk_behind_them() -> None:
    async with linked() as link:
        await by_layers(link, (2, 4, 5))
    said = [(each.WhichOneof("event"), each.landed.end_layer) for each in link.told]
    assert said[-1] == ("chunk", 0)
    for event, end_layer in said:
        assert event == "chunk" or end_layer in range(1, 5), "with the last layers the chunk is told"
    async with linked(share=0.0) as link:
        await by_layers(link, (2, 4, 5))
    assert {each.WhichOneof("event") for each in link.told} == {"chunk"}


async def test_a_slow_receiver_keeps_what_is_in_flight_bounded_and_other_hand_overs_go_on() -> None:
    group_bytes = 2 * WHOLE.token_bytes // 5 * 6  # of two layers of six tokens
    shared = Link(window_bytes=5 * group_bytes, handoff_bytes=2 * group_bytes)
    slow = {number: Fault(FaultKind.DELAY, delay_s=0.4) for number in range(20)}
    async with linked(faults=slow, link=shared, name="slow") as first, linked(link=shared, name="quick") as second:
        driving = asyncio.create_task(by_layers(first, (2, 4, 5)))
        await asyncio.sleep(0.1)
        assert 0 < first.transport.counts()["transfers"] <= 2
        await by_layers(second, (2, 4, 5))
        await until(lambda: len(second.released) == len(CHUNKS))
        assert not first.released, "its first write has not landed"
        first.failed.set_result(RequestCancelled("given up"))
        await driving
    assert second.chunks[-1][0] + second.chunks[-1][1] == TOKENS
    assert sorted(first.released) == list(CHUNKS)
