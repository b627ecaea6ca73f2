"""Which workers a request with an adapter may go to, while workers come, go and get other files."""

from __future__ import annotations

import grpc
import pytest

from legato.v1 import common_pb2, inference_pb2
from service.status import error_from_rpc
from spec.errors import UnknownModel
from tests.router.toy_cluster import ToyDecode, ToyPrefill, ToyRouter


def having(worker: ToyPrefill | ToyDecode, **revisions: str) -> ToyPrefill | ToyDecode:
    worker.record.adapters.extend(common_pb2.Adapter(name=name, revision=of) for name, of in revisions.items())
    return worker


async def route_of(router: ToyRouter, adapter: str) -> tuple[str, str]:
    sampling = common_pb2.SamplingParams(max_tokens=3, seed=1, ignore_eos=True)
    asked = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[1, 2, 3]),
        options=inference_pb2.AnswerOptions(sampling=sampling, adapter=adapter),
    )
    try:
        finished = [response.finished async for response in router.stub.Generate(asked, timeout=20)][-1]
    except grpc.aio.AioRpcError as rpc_error:
        raise error_from_rpc(rpc_error) from None
    return finished.route.prefill_worker_id, finished.route.decode_worker_id


async def test_a_request_goes_to_workers_with_equal_revisions(router: ToyRouter) -> None:
    await router.join(
        having(ToyPrefill("p1"), poems="1", prose="1"),
        having(ToyPrefill("p2"), poems="2"),
        having(ToyDecode("d1"), prose="1", poems="0"),
        having(ToyDecode("d2"), poems="2"),
    )
    for _ in range(3):
        assert await route_of(router, "poems") == ("p2", "d2"), "the revision that both pools have"
        assert await route_of(router, "prose") == ("p1", "d1")
    listed = (await router.stub.ListModels(inference_pb2.ListModelsRequest())).models
    assert [[(each.name, each.revision) for each in model.adapters] for model in listed] == [
        [("poems", "0"), ("poems", "1"), ("poems", "2"), ("prose", "1")]
    ]
    await router.at_rest()


async def test_where_no_revision_has_both_pools_a_decode_worker_does_all_of_it(router: ToyRouter) -> None:
    await router.join(having(ToyPrefill("p1"), poems="1"), having(ToyDecode("d1"), poems="2"))
    assert await route_of(router, "poems") == ("", "d1")
    assert await route_of(router, "") == ("p1", "d1")
    await router.at_rest()


async def test_one_that_nobody_has_is_said_with_those_that_are_known(router: ToyRouter) -> None:
    await router.join(having(ToyPrefill("p1"), prose="1", poems="1"), ToyDecode("d1"))
    with pytest.raises(UnknownModel, match="no adapter 'verse'; its adapters are poems, prose") as caught:
        await route_of(router, "verse")
    assert caught.value.details["adapters"] == "poems, prose"
    await router.at_rest()


async def test_what_workers_had_is_known_while_none_is_there(router: ToyRouter) -> None:
    """They may be back in a moment: the request waits for that, and is not told that there is no such adapter."""
    await router.join(having(ToyPrefill("p1"), poems="1"), having(ToyDecode("d1"), poems="1"))
    model = router.registry.model("")
    for worker in router.workers:
        await worker.kill()
    router.apply(*router.workers)
    await router.until(lambda: not router.registry.workers)
    assert [adapter.name for adapter in router.registry.adapters(model)] == ["poems"]
    assert router.registry.model("", "poems").identity.adapter == "poems@1"
    await router.at_rest()
