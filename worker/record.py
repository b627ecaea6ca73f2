"""What a worker says of itself to its cluster, and what its KV is of."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence

from engine.adapters import AdapterFiles
from engine.model_base import ModelFiles
from kvtransfer.probing import rdma_devices
from kvtransfer.routes import ranks_to_proto, whole_layout
from legato.v1 import common_pb2, worker_pb2
from service.config import WorkerConfig
from service.messages import identity_text, layout_to_proto, model_identity
from service.wire import spoken
from spec.dtype import Dtype
from worker.core import CoreRank


def record_of(
    config: WorkerConfig,
    files: ModelFiles,
    adapters: Mapping[str, AdapterFiles],
    ranks: Sequence[CoreRank],
    endpoints: Sequence[worker_pb2.TransportEndpoint],
    *,
    dtype: Dtype,
    total_blocks: int,
    max_context_tokens: int,
) -> worker_pb2.WorkerRecord:
    """All but the address, which is known once the server listens. `adapters` by name; `dtype`: of the weights."""
    return worker_pb2.WorkerRecord(
        worker_id=config.worker_id or f"{config.role}-{secrets.token_hex(4)}",
        role=worker_pb2.PREFILL if config.role == "prefill" else worker_pb2.DECODE,
        epoch=time.time_ns(),  # grows from one start to the next, as the registry wants it
        identity=model_identity(
            config.engine.model, files.revision, dtype, config.engine.quantisation, config.engine.activations
        ),
        kv_layout=layout_to_proto(whole_layout(ranks)),
        ranks=ranks_to_proto(ranks),
        total_blocks=total_blocks,
        max_context_tokens=max_context_tokens,
        max_step_tokens=config.engine.max_step_tokens,
        endpoints=endpoints,
        model_path=str(files.path),
        pid=os.getpid(),
        vocab_size=files.spec.vocab_size,
        eos_token_ids=files.spec.eos_token_ids,
        wire=spoken(),
        rdma_devices=rdma_devices(),
        adapters=[common_pb2.Adapter(name=name, revision=a.revision) for name, a in adapters.items()],
    )


def content_salt(record: worker_pb2.WorkerRecord, files: ModelFiles) -> bytes:
    """Blocks of equal tokens are equal content under an equal salt alone: see scheduler/prefix.py."""
    return (identity_text(record.identity) + files.revision).encode()
