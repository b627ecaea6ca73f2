"""Which prefill workers hand over to which decode workers."""

from __future__ import annotations

from legato.v1 import worker_pb2
from router.registry import compatible


def record(**identity: str) -> worker_pb2.WorkerRecord:
    words = {"model_id": "m", "revision": "r", "adapter": "", "compute_dtype": "float32", **identity}
    layout = worker_pb2.KVLayout(num_layers=4, num_kv_heads=2, head_dim=8, block_tokens=16, dtype="float32", planes=2)
    return worker_pb2.WorkerRecord(
        identity=worker_pb2.ModelIdentity(**words),
        kv_layout=layout,
        ranks=[worker_pb2.RankKV(num_layers=4, num_heads=2)],
        endpoints=[worker_pb2.TransportEndpoint(name="sockets")],
    )


def test_whatever_the_layouts_if_the_model_is_the_same() -> None:
    other = record()
    other.kv_layout.block_tokens, other.kv_layout.dtype = 5, "int8"
    del other.ranks[:]
    other.ranks.extend(worker_pb2.RankKV(first_head=head, num_layers=4, num_heads=1) for head in range(2))
    assert compatible(record(), other)
    assert compatible(other, record())


def test_never_between_models_revisions_adapters_or_dtypes_of_computing() -> None:
    for field in ("model_id", "revision", "adapter", "compute_dtype"):
        assert not compatible(record(), record(**{field: "other"}))


def test_never_between_workers_that_speak_no_version_of_the_wire_in_common() -> None:
    def speaking(oldest: int, newest: int) -> worker_pb2.WorkerRecord:
        made = record()
        made.wire.oldest, made.wire.newest = oldest, newest
        return made

    assert compatible(speaking(1, 1), record()), "who says nothing speaks version 1"
    assert compatible(speaking(1, 3), speaking(3, 4))
    assert not compatible(speaking(1, 2), speaking(3, 4))
    assert not compatible(speaking(3, 4), speaking(1, 2))
    assert not compatible(speaking(2, 3), record())


def test_never_to_one_that_takes_no_kv_over() -> None:
    """Its ranks are on several hosts."""
    far = record()
    del far.endpoints[:]
    assert not compatible(record(), far)
