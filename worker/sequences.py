"""The wire's sequence state as the scheduler's sequence."""

from __future__ import annotations

import time

from legato.v1 import worker_pb2
from scheduler.sequence import Sequence
from service.messages import sampling_from_proto
from spec.errors import InvalidParameter
from spec.sampling import check_logprobs_fit, check_token_ids
from worker.clock import monotonic_s


def sequence_from_proto(state: worker_pb2.SequenceState, vocab_size: int, *, draws_here: int | None = None) -> Sequence:
    """`draws_here`: stop with blocks held after that many tokens; None: until the answer is finished.

    Raises InvalidParameter for what would not be an input but a fault inside the engine: nothing is taken on trust."""
    params = sampling_from_proto(state.sampling)
    params.validate(vocab_size)
    check_logprobs_fit(params, len(state.prompt_token_ids))
    if not state.prompt_token_ids:
        raise InvalidParameter("must hold at least one token", field="prompt_token_ids")
    check_token_ids(state.prompt_token_ids, vocab_size, field="prompt_token_ids")
    check_token_ids(state.output_token_ids, vocab_size, field="output_token_ids")
    return Sequence(
        sequence_id=state.sequence_id,
        prompt_token_ids=tuple(state.prompt_token_ids),
        output_token_ids=list(state.output_token_ids),
        params=params,
        deadline_s=monotonic_s(state.deadline_unix_ns),
        draws_here=draws_here,
        queued_s=time.monotonic(),
    )
