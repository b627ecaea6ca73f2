"""The wire's sequence state as the scheduler's sequence, and back."""

from __future__ import annotations

import time

from legato.v1 import worker_pb2
from scheduler.sequence import Sequence
from service.messages import sampling_from_proto, sampling_to_proto, serves, with_adapter
from spec.errors import InvalidParameter, TicketRefused
from spec.sampling import check_logprobs_fit, check_token_ids
from worker.clock import monotonic_s, unix_ns


def identity_of(state: worker_pb2.SequenceState, record: worker_pb2.WorkerRecord) -> worker_pb2.ModelIdentity:
    """Whose KV the sequence's is. Raises TicketRefused where this worker has not its adapter in that revision."""
    identity = with_adapter(record.identity, state.adapter)
    if not serves(record, identity):
        raise TicketRefused(f"{record.worker_id} has no adapter {state.adapter}", cause="adapter")
    return identity


def sequence_from_proto(
    state: worker_pb2.SequenceState, record: worker_pb2.WorkerRecord, *, draws_here: int | None = None
) -> Sequence:
    """`record`: of this worker. `draws_here`: stop with blocks held after that many tokens; None: until the answer is
    finished.

    Raises InvalidParameter for what would not be an input but a fault inside the engine: nothing is taken on trust; and
    as identity_of() does."""
    identity_of(state, record)
    vocab_size = record.vocab_size
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
        adapter=state.adapter,
        queued_s=time.monotonic(),
    )


def sequence_to_proto(sequence: Sequence, sequence_id: str) -> worker_pb2.SequenceState:
    """All that it needs to go on elsewhere, under the id that it has there."""
    return worker_pb2.SequenceState(
        sequence_id=sequence_id,
        prompt_token_ids=sequence.prompt_token_ids,
        output_token_ids=sequence.output_token_ids,
        sampling=sampling_to_proto(sequence.params),
        deadline_unix_ns=unix_ns(sequence.deadline_s),
        adapter=sequence.adapter,
    )
