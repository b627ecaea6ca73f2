"""How the router keeps its links, and what it makes of a worker's own word about its load."""

from __future__ import annotations

import asyncio

import pytest

from legato.v1 import common_pb2, inference_pb2
from tests.router.toy_cluster import ToyDecode, ToyPrefill, ToyRouter


async def prefilled_by(router: ToyRouter) -> str:
    options = inference_pb2.AnswerOptions(sampling=common_pb2.SamplingParams(max_tokens=3, seed=1, ignore_eos=True))
    asked = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]), options=options)
    finished = [response.finished async for response in router.stub.Generate(asked, timeout=20)][-1]
    return str(finished.route.prefill_worker_id)


@pytest.mark.parametrize("fails", ["at once", "after the first message"])
async def test_a_link_that_never_holds_is_dialled_ever_less_often(
    router: ToyRouter, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """The third wait is longer than the test: there must be no fourth call, though Describe answers every time."""
    monkeypatch.setattr("router.worker.REDIAL_S", (0.0, 0.0, 3600.0))
    decode = ToyDecode("d0")
    decode.faults.subscribe_fails = fails
    await decode.start()
    router.workers.append(decode)
    router.apply()
    await router.until(lambda: decode.subscribed == 3)
    await asyncio.sleep(0.2)
    assert decode.subscribed == 3
    assert not router.registry.workers["d0"].linked


async def test_a_link_that_held_is_dialled_at_once(router: ToyRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each link lasts longer than the longest wait, so that the wait after it is the shortest."""
    monkeypatch.setattr("router.worker.REDIAL_S", (0.0, 3600.0, 0.001))
    decode = ToyDecode("d0")
    await router.join(decode)
    for broken in range(1, 6):
        await router.until(lambda: router.registry.workers["d0"].linked)
        await asyncio.sleep(0.01)
        decode.subscribers["r0"].put_nowait(None)
        await router.until(lambda broken=broken: decode.subscribed == broken + 1)


async def test_work_of_other_routers_counts(router: ToyRouter) -> None:
    busy = ToyPrefill("p0")
    busy.waiting_tokens = 20
    await router.join(busy, ToyPrefill("p1"), ToyDecode("d0"))
    assert await prefilled_by(router) == "p1"
    busy.waiting_tokens = 0
    await router.until(lambda: not router.registry.workers["p0"].load.waiting_tokens)
    assert await prefilled_by(router) == "p0"


async def test_a_report_does_not_outlast_the_work_that_it_told_of(router: ToyRouter) -> None:
    """The worker's next word may be a second away; until then what ended here is taken off its last one."""
    toy = ToyPrefill("p0")
    await router.join(toy, ToyDecode("d0"))
    worker = router.registry.workers["p0"]
    ours, more = worker.charge("a", 30), worker.charge("b", 5)
    toy.waiting_tokens = 50
    await worker.refresh()
    assert worker.prefill_view().outstanding_tokens == 50
    ours.release()
    assert worker.prefill_view().outstanding_tokens == 20
    more.release()
    assert worker.prefill_view().outstanding_tokens == 15
    toy.waiting_tokens = 15
    await worker.refresh()
    assert worker.prefill_view().outstanding_tokens == 15
    worker.charge("c", 40)
    assert worker.prefill_view().outstanding_tokens == 40
