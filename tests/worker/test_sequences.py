"""What a peer sends is checked before it can reach the engine: a fault there would end the whole worker."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from legato.v1 import common_pb2, worker_pb2
from spec.errors import InvalidParameter
from worker.sequences import sequence_from_proto

VOCAB = 100


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
    sequence = sequence_from_proto(state(lambda made: made.output_token_ids.append(7)), VOCAB, draws_here=1)
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
        sequence_from_proto(state(change), VOCAB)
    assert caught.value.details["field"] == field
