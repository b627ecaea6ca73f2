"""Wire messages of models and cluster -> what the client gives back."""

from __future__ import annotations

from legato.types import Adapter, ClusterView, Model, Quantiles, WorkerView
from legato.v1 import inference_pb2


def models_of(response: inference_pb2.ListModelsResponse) -> list[Model]:
    return [
        Model(
            one.id,
            one.revision,
            one.max_context_tokens,
            one.vocab_size,
            one.chat,
            tuple(Adapter(adapter.name, adapter.revision) for adapter in one.adapters),
        )
        for one in response.models
    ]


def cluster_of(response: inference_pb2.GetClusterResponse) -> ClusterView:
    router = response.router
    return ClusterView(
        router_id=response.router_id,
        workers=tuple(_worker_of(one) for one in response.workers),
        waiting_requests=router.waiting_requests,
        running_requests=router.running_requests,
        finished_requests=router.finished_requests,
        failed_requests=router.failed_requests,
        ttft_s=_quantiles_of(router.ttft_s),
        itl_s=_quantiles_of(router.itl_s),
        registry_reachable=router.registry_reachable,
    )


def _worker_of(one: inference_pb2.GetClusterResponse.WorkerView) -> WorkerView:
    return WorkerView(**{field: getattr(one, field) for field in WorkerView.__dataclass_fields__})


def _quantiles_of(one: inference_pb2.GetClusterResponse.Quantiles) -> Quantiles:
    return Quantiles(one.p50, one.p90, one.p99, one.count)
