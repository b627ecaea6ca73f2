"""What a peer sends is checked before it can reach the engine: a fault there would end the whole worker."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from legato.v1 import common_pb2, worker_pb2
from spec.errors import InvalidParameter, TicketRefused
from worker.sequences import identity_of, sequence_from_proto

VOCAB = 100
RECORD = worker_pb2.WorkerRecord(
    identity=worker_pb2.ModelIdentity(model_id="m", revision="1"),
    vocab_size=VOCAB,
    adapters=[common_pb2.Adapter(name="poems", revision="7")],
)


def state(change: Callable[[worker_pb2.SequenceState], object] = lambda made: None) -> worker_pb2.SequenceState:
    made = worker_pb2.SequenceState(
        sequence_id="a.0.1",
        prompt_token_ids=[5, 6],
        sampling=common_pb2.SamplingParams(max_tokens=4, seed=1),
        deadline_unix_ns=time.time_ns() + 10**9,
    )
    change(made)
    return made


def test_what_is_right_is_taken_over() -> None:
    sequence = sequence_from_proto(state(lambda made: made.output_token_ids.append(7)), RECORD, draws_here=1)
    assert (sequence.prompt_token_ids, sequence.output_token_ids, sequence.draws_here) == ((5, 6), [7], 1)
    assert (sequence.params.top_p, sequence.params.repetition_penalty) == (1.0, 1.0), "absent means off"
    assert 0.5 < sequence.deadline_s - time.monotonic() < 1.1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda made: made.ClearField("prompt_token_ids"), "prompt_token_ids"),
        (lambda made: made.prompt_token_ids.append(VOCAB), "prompt_token_ids"),
        (lambda made: made.output_token_ids.append(2**32 - 1), "output_token_ids"),
        (lambda made: setattr(made.sampling, "top_p", 9.0), "top_p"),
        (lambda made: setattr(made.sampling, "temperature", float("nan")), "temperature"),
        (lambda made: setattr(made.sampling, "max_tokens", 0), "max_tokens"),
        (lambda made: made.sampling.logit_bias.update({VOCAB: 1.0}), "logit_bias"),
        (lambda made: setattr(made.sampling, "logprobs", VOCAB + 1), "logprobs"),
    ],
)
def test_what_is_not_is_named(change: Callable[[worker_pb2.SequenceState], object], field: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        sequence_from_proto(state(change), RECORD)
    assert caught.value.details["field"] == field


def test_an_adapter_is_this_workers_own_in_that_revision() -> None:
    asked = state(lambda made: setattr(made, "adapter", "poems@7"))
    assert sequence_from_proto(asked, RECORD).adapter == "poems@7"
    identity = identity_of(asked, RECORD)
    assert (identity.model_id, identity.revision, identity.adapter) == ("m", "1", "poems@7")
    assert identity_of(state(), RECORD) == RECORD.identity
    for other in ("poems@8", "poems", "prose@7", "@"):
        with pytest.raises(TicketRefused):
            sequence_from_proto(state(lambda made, other=other: setattr(made, "adapter", other)), RECORD)
