"""The wire's sequence state as the scheduler's sequence."""

from __future__ import annotations

import time

from legato.v1 import worker_pb2
from scheduler.sequence import Sequence
from service.messages import sampling_from_proto
from worker.clock import monotonic_s


def sequence_from_proto(state: worker_pb2.SequenceState, *, draws_here: int | None = None) -> Sequence:
    """`draws_here`: stop with blocks held after that many tokens; None: until the answer is finished."""
    return Sequence(
        sequence_id=state.sequence_id,
        prompt_token_ids=tuple(state.prompt_token_ids),
        output_token_ids=list(state.output_token_ids),
        params=sampling_from_proto(state.sampling),
        deadline_s=monotonic_s(state.deadline_unix_ns),
        draws_here=draws_here,
        queued_s=time.monotonic(),
    )
