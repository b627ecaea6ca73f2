"""What goes over the real wire bytes comes out the same, field by field."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from legato.v1 import common_pb2, worker_pb2
from service import messages
from spec.constraint import Constraint, ConstraintKind
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration, InvalidParameter
from spec.layout import KVLayout
from spec.sampling import SamplingParams, Speculation, TokenLogprobs

# every field differs from its default, and is exact in float32
FULL = SamplingParams(
    max_tokens=7,
    temperature=0.5,
    top_k=40,
    top_p=0.75,
    min_p=0.125,
    repetition_penalty=1.25,
    presence_penalty=-0.5,
    frequency_penalty=0.25,
    logit_bias={3: -1.5, 49151: 2.0},
    seed=2**64 - 1,
    stop_token_ids=(1, 2),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=5,
    forced_token_ids=(9, 8, 7),
    speculation=Speculation("prompt_lookup", 5, 2),
    constraint=Constraint("choice", ("a", "b")),
)


@pytest.mark.parametrize("params", [FULL, SamplingParams()], ids=["full", "default"])
def test_sampling_survives_the_wire(params: SamplingParams) -> None:
    fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(SamplingParams)}
    if (speculation := fields.pop("speculation")) is not None:
        kind, num_draft_tokens, ngram = common_pb2.Speculation.PROMPT_LOOKUP, 5, 2
        assert speculation == Speculation("prompt_lookup", num_draft_tokens, ngram)
        fields["speculation"] = common_pb2.Speculation(kind=kind, num_draft_tokens=num_draft_tokens, ngram=ngram)
    if (constraint := fields.pop("constraint")) is not None:
        fields["constraint"] = common_pb2.Constraint(choice=common_pb2.Constraint.Choice(texts=constraint.texts))
    sent = common_pb2.SamplingParams(**fields).SerializeToString()
    got = messages.sampling_from_proto(common_pb2.SamplingParams.FromString(sent))
    for field in dataclasses.fields(SamplingParams):
        assert getattr(got, field.name) == getattr(params, field.name), field.name


def test_kinds_of_speculation() -> None:
    kinds = common_pb2.Speculation.Kind
    for kind, expected in ((kinds.PROMPT_LOOKUP, "prompt_lookup"), (kinds.DRAFT_MODEL, "draft_model")):
        message = common_pb2.SamplingParams(speculation=common_pb2.Speculation(kind=kind))
        speculation = messages.sampling_from_proto(message).speculation
        assert speculation is not None
        assert speculation.kind == expected
    for unknown in (0, 7):
        message = common_pb2.SamplingParams(speculation=common_pb2.Speculation(kind=unknown))  # type: ignore[arg-type]
        with pytest.raises(InvalidParameter) as raised:
            messages.sampling_from_proto(message)
        assert raised.value.details["field"] == "speculation"


def test_kinds_of_constraints() -> None:
    for kind in ("json_schema", "regex", "grammar"):
        message = common_pb2.Constraint(**{kind: "text"})
        assert messages.constraint_from_proto(message) == Constraint(kind, ("text",))
        assert messages.constraint_to_proto(Constraint(kind, ("text",))) == message
    assert {field.name for field in common_pb2.Constraint.DESCRIPTOR.fields} == set(typing.get_args(ConstraintKind))
    with pytest.raises(InvalidParameter) as raised:
        messages.sampling_from_proto(common_pb2.SamplingParams(constraint=common_pb2.Constraint()))
    assert raised.value.details["field"] == "constraint"


def test_every_sampling_field_of_the_wire_has_its_word() -> None:
    wire = {field.name for field in common_pb2.SamplingParams.DESCRIPTOR.fields}
    assert wire == {field.name for field in dataclasses.fields(SamplingParams)}
    default = SamplingParams()
    assert all(getattr(FULL, name) != getattr(default, name) for name in wire), "FULL leaves no field at its default"


def test_tokens_and_logprobs_survive_the_wire() -> None:
    logprobs = TokenLogprobs(-0.25, ((5, -0.25), (4, -1.5)))
    sent = common_pb2.TokenLogprobs(logprob=-0.25, top_token_ids=[5, 4], top_logprobs=[-0.25, -1.5])
    assert messages.logprobs_to_proto(logprobs) == sent
    assert messages.token_to_proto(5, logprobs) == common_pb2.Token(token_id=5, logprobs=sent)
    assert not messages.token_to_proto(0).HasField("logprobs")


def test_layouts_survive_the_wire_and_bad_ones_are_named() -> None:
    layout = KVLayout(30, 3, 64, 16, Dtype.BFLOAT16)
    message = messages.layout_to_proto(layout)
    assert messages.layout_from_proto(message) == layout
    message.head_dim = 0
    with pytest.raises(InvalidParameter, match=r"kv_layout\.head_dim"):
        messages.layout_from_proto(message)
    with pytest.raises(InvalidConfiguration, match="float7"):
        messages.layout_from_proto(
            worker_pb2.KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=1, dtype="float7")
        )


def test_every_finish_reason_has_its_word() -> None:
    words = {None: "UNSPECIFIED", "stop": "STOP", "length": "LENGTH"}
    for reason, name in words.items():
        assert common_pb2.FinishReason.Name(messages.finish_to_proto(reason)) == f"FINISH_REASON_{name}"
    assert len(words) == len(common_pb2.FinishReason.values())


def test_identities_compare_by_value() -> None:
    identity = messages.model_identity("smollm2", "0123456789", Dtype.BFLOAT16)
    assert identity == messages.model_identity("smollm2", "0123456789", Dtype.BFLOAT16)
    assert identity != messages.model_identity("smollm2", "0123456780", Dtype.BFLOAT16)
    assert messages.identity_text(identity) == "smollm2@01234567 bfloat16"
    rounds = messages.model_identity("smollm2", "0123456789", Dtype.BFLOAT16, activations="stored")
    assert rounds != identity
    assert messages.identity_text(rounds) == "smollm2@01234567 bfloat16/stored activations"
