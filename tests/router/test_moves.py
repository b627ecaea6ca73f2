"""Sequences that leave a decode worker while they run: the stream is the one without it, and nobody holds anything."""

from __future__ import annotations

import asyncio

import pytest

from legato.v1 import worker_pb2
from router import moves
from spec.errors import DigestMismatch
from tests.router.test_journey import Read, ask, request
from tests.router.toy_cluster import ToyDecode, ToyPrefill, ToyRouter

LONG = 300
BLOCKS = 1000  # enough for all


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "FIRST_AGAIN_S", 0.02)


def drain(router: ToyRouter, worker: ToyDecode, draining: bool = True) -> None:
    """As the registry says it."""
    record = worker_pb2.WorkerRecord()
    record.CopyFrom(worker.record)
    record.draining = draining
    worker.record = record
    router.apply()


async def streams(
    router: ToyRouter, count: int = 6, prefills: int = 1
) -> tuple[list[ToyDecode], list[asyncio.Task[Read]]]:
    """All on d0, each with some tokens."""
    decodes = [ToyDecode("d0", BLOCKS)]
    await router.join(*(ToyPrefill(f"p{i}") for i in range(prefills)), *decodes)
    asked = [request([i, i + 1, 7], seed=i, max_tokens=LONG, ignore_eos=True) for i in range(count)]
    reads = [asyncio.create_task(ask(router, each)) for each in asked]
    await router.until(lambda: len(decodes[0].sequences) == count and decodes[0].tokens > 5 * count)
    return decodes, reads


async def read_all(router: ToyRouter, reads: list[asyncio.Task[Read]]) -> list[Read]:
    found = list(await asyncio.gather(*reads))
    assert [read.tokens[0] for read in found] == [read.expected for read in found]
    await router.at_rest()
    return found


@pytest.mark.parametrize("prefills", [0, 1])
async def test_what_runs_on_a_draining_worker_moves(router: ToyRouter, prefills: int) -> None:
    (source,), reads = await streams(router, prefills=prefills)
    target = ToyDecode("d1", BLOCKS)
    await router.join(target)
    drain(router, source)
    await router.until(lambda: not source.sequences)
    assert target.sequences
    found = await read_all(router, reads)
    for read in found:
        route = read.finished[0].route
        assert (route.attempts, route.moves, route.decode_worker_id) == (1, 1, "d1")


async def test_where_nobody_has_room_they_stay_until_somebody_has(router: ToyRouter) -> None:
    (source,), reads = await streams(router)
    drain(router, source)
    target = ToyDecode("d1", total_blocks=80)  # for one of them
    await router.join(target)
    await router.until(lambda: target.sequences)
    found = await read_all(router, reads)
    assert target.most_sequences == 1
    assert sorted({read.finished[0].route.moves for read in found}) == [0, 1]


async def test_a_move_that_fails_is_tried_again(router: ToyRouter) -> None:
    (source,), reads = await streams(router, 1)
    source.faults.move_error_once = DigestMismatch("planted")
    await router.join(ToyDecode("d1", BLOCKS))
    drain(router, source)
    (read,) = await read_all(router, reads)
    assert (read.finished[0].route.attempts, read.finished[0].route.moves) == (1, 1)


async def test_a_worker_that_drains_no_more_keeps_its_own(router: ToyRouter) -> None:
    (source,), reads = await streams(router, 1)
    source.faults.move_error_once = DigestMismatch("planted")
    await router.join(ToyDecode("d1", BLOCKS))
    drain(router, source)
    await router.until(lambda: source.faults.move_error_once is None)
    drain(router, source, draining=False)
    (read,) = await read_all(router, reads)
    assert read.finished[0].route.moves == 0


async def test_what_the_target_says_too_early_waits(router: ToyRouter) -> None:
    """Its tokens are here before the source's last ones, and its last before the source has said that it moved."""
    (source,), reads = await streams(router, 2)
    target = ToyDecode("d1", BLOCKS, step_s=0.0001)
    await router.join(target)
    source.faults.move_word_delay_s = 1.0
    drain(router, source)
    await router.until(lambda: target.tokens > LONG)
    found = await read_all(router, reads)
    assert [read.finished[0].route.moves for read in found] == [1, 1]


async def test_a_target_that_runs_what_stayed_is_not_heard(router: ToyRouter) -> None:
    """Its numbers may be others than the source's: a stream is never of both."""
    (source,), reads = await streams(router, 1)
    target = ToyDecode("d1", BLOCKS)
    await router.join(target)
    source.faults.resume_after_move_once = True
    other = iter(range(1000))
    target._token = lambda *_: next(other) % 256  # type: ignore[method-assign]
    drain(router, source)
    await router.until(lambda: target.tokens > 0)
    drain(router, source, draining=False)
    (read,) = await read_all(router, reads)
    assert read.finished[0].route.moves == 0


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_source_that_dies_on_the_way_is_a_failover(router: ToyRouter, when: str) -> None:
    (source,), reads = await streams(router, 3)
    await router.join(ToyDecode("d1", BLOCKS))
    source.faults.die_in_move = when
    drain(router, source)
    found = await read_all(router, reads)
    assert {read.finished[0].route.attempts for read in found} == {2}


async def test_a_target_that_dies_on_the_way_is_nothing_to_the_stream(router: ToyRouter) -> None:
    (source,), reads = await streams(router, 3)
    target = ToyDecode("d1", BLOCKS)
    await router.join(target)
    source.faults.move_delay_s = 5.0
    drain(router, source)
    await router.until(lambda: target.sequences)
    await target.kill()
    found = await read_all(router, reads)
    assert {(read.finished[0].route.attempts, read.finished[0].route.moves) for read in found} == {(1, 0)}


@pytest.mark.parametrize("phase", ["reserving", "moving", "told"])
async def test_a_client_that_leaves_on_the_way_leaves_nothing(router: ToyRouter, phase: str) -> None:
    (source,), reads = await streams(router, 2)
    target = ToyDecode("d1", BLOCKS)
    await router.join(target)
    target.faults.reserve_delay_s = 0.05 if phase == "reserving" else 0.0
    source.faults.move_delay_s = 0.05 if phase == "moving" else 0.0
    source.faults.move_word_delay_s = 0.05 if phase == "told" else 0.0
    drain(router, source)
    await router.until(lambda: [name for name, _ in target.called_under] == ["Reserve"] * 2)
    await asyncio.sleep(0.02)
    for read in reads:
        read.cancel()
    await asyncio.gather(*reads, return_exceptions=True)
    await router.at_rest()


async def test_one_that_ends_while_it_moves_has_its_whole_answer(router: ToyRouter) -> None:
    (source,), reads = await streams(router, 2)
    await router.join(ToyDecode("d1", BLOCKS))
    source.faults.move_delay_s = 30.0
    drain(router, source)
    found = await read_all(router, reads)
    assert [read.finished[0].route.moves for read in found] == [0, 0]


@pytest.mark.parametrize("sign", ["waiting", "preempting"])
async def test_a_worker_that_is_short_of_blocks_gives_one_sequence_to_another(router: ToyRouter, sign: str) -> None:
    source, balancer = ToyDecode("d0", 160), moves.Balancer(router.registry)
    await router.join(source)
    reads = [
        asyncio.create_task(ask(router, request(list(range(length)), seed=length, max_tokens=LONG, ignore_eos=True)))
        for length in (15, 6)
    ]
    await router.until(lambda: len(source.sequences) == 2 and source.tokens > 10)
    known = router.registry.workers["d0"]
    balancer.look()
    assert known.asked is None, "nothing says that it is short"
    source.waiting_requests, source.preemptions = (1, 0) if sign == "waiting" else (0, 1)
    await router.until(lambda: (known.load.waiting_requests, known.load.preemptions) != (0, 0))
    balancer.look()
    assert known.asked is None, "nobody has room"
    target = ToyDecode("d1", BLOCKS)
    await router.join(target)
    source.preemptions *= 2
    await router.until(lambda: known.load.preemptions == source.preemptions and any(c.draws for c in known.charges))
    balancer.look()
    assert known.asked is not None
    await router.until(lambda: target.tokens)
    balancer.look()
    assert known.asked is None, "one at a time, and the one that is left is more of a load there than here"
    found = await read_all(router, reads)
    assert [read.finished[0].route.moves for read in found] == [0, 1], "the shorter one"


async def test_one_that_is_asked_to_leave_and_cannot_is_asked_no_more(router: ToyRouter) -> None:
    source, target, balancer = ToyDecode("d0", 160), ToyDecode("d1", BLOCKS), moves.Balancer(router.registry)
    await router.join(source)
    reads = [
        asyncio.create_task(ask(router, request([1, 2], seed=i, max_tokens=LONG, ignore_eos=True))) for i in (1, 2)
    ]
    await router.until(lambda: source.tokens > 10)
    await router.join(target)
    target.faults.refuse_reserve = True
    source.waiting_requests = 1
    known = router.registry.workers["d0"]
    await router.until(lambda: known.load.waiting_requests)
    balancer.look()
    await router.until(lambda: ("Reserve") in [name for name, _ in target.called_under])
    source.waiting_requests = 0
    await router.until(lambda: not known.load.waiting_requests)
    balancer.look()
    found = await read_all(router, reads)
    assert [(read.finished[0].route.moves, read.finished[0].route.attempts) for read in found] == [(0, 1), (0, 1)]
