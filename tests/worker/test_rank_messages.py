"""What goes to another rank comes back as it was: every field, set to what no default is."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any

from legato.v1 import rank_pb2
from scheduler.plan import Draw, Drawn, Slice, StepPlan, StepResult
from service.messages import sampling_from_proto, sampling_to_proto
from spec.constraint import Constraint
from spec.sampling import SamplingParams, Speculation, TokenLogprobs
from worker.rank_messages import PlanWriter, plan_from_message, result_from_message, result_to_message

PARAMS = SamplingParams(
    max_tokens=431,
    temperature=0.75,
    top_k=6,
    top_p=0.5,
    min_p=0.125,
    repetition_penalty=1.25,
    presence_penalty=-0.5,
    frequency_penalty=0.375,
    logit_bias=MappingProxyType({7: 2.5, 123: -3.0}),
    seed=2**63 + 5,
    stop_token_ids=(5, 0),
    ignore_eos=True,
    logprobs=0,
    prompt_logprobs=3,
    forced_token_ids=(9, 8),
    speculation=Speculation("draft_model", 5, 2),
    constraint=Constraint("choice", ("one", "another")),
)
DRAW = Draw(PARAMS, position=77, prompt_tokens=42, history=(1, 2, 3))
SLICE = Slice("a/0", (4, 5), 6, (9, 0, 123), DRAW, 0, (11, 12), "an adapter", guessed_token_ids=(13, 14))


def assert_nothing_is_a_default(value: Any, but: tuple[str, ...] = ()) -> None:
    defaults = (
        {field.name: field.default for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    )
    for name, default in (defaults or value._field_defaults).items():
        if name not in but and default is not dataclasses.MISSING:
            assert getattr(value, name) != default, f"{name} is not tried"


def through_the_wire(plan: StepPlan, writer: PlanWriter) -> StepPlan:
    return plan_from_message(rank_pb2.RankPlan.FromString(writer.write(plan.step, plan).SerializeToString()))


def test_sampling_parameters_with_every_field() -> None:
    assert_nothing_is_a_default(PARAMS)
    assert sampling_from_proto(sampling_to_proto(PARAMS)) == PARAMS
    assert sampling_from_proto(sampling_to_proto(SamplingParams())) == SamplingParams()


def test_a_plan_with_every_field() -> None:
    assert_nothing_is_a_default(SLICE, but=("proposal",))  # rank 0 has made guesses of it
    bare = Slice("b", (3,), 0, (1,), None)
    writer = PlanWriter()
    for plan in (StepPlan(431, (SLICE, bare)), StepPlan(432, (SLICE,)), StepPlan(433, ())):
        assert through_the_wire(plan, writer) == plan


def test_parameters_are_told_apart() -> None:
    """They are remembered by identity: one that has died must not stand for another."""
    writer = PlanWriter()
    for seed in range(50):
        params = SamplingParams(seed=seed)
        plan = StepPlan(0, (Slice("a", (1,), 0, (0,), Draw(params, 1, 1, ())),))
        assert through_the_wire(plan, writer) == plan


def test_a_result_with_every_field() -> None:
    scored = TokenLogprobs(-0.5, ((7, -0.25), (3, -1.5)))
    result = StepResult(
        ((Drawn(5, scored), Drawn(6, completes=True)), (), (Drawn(-1, refusal="admits no token here"),)),
        ((scored, scored), (), (TokenLogprobs(-2.0),)),
    )
    message = rank_pb2.RankResult.FromString(result_to_message(6, 0.5, result).SerializeToString())
    assert (message.step, message.busy_s) == (6, 0.5)
    assert result_from_message(message) == result
    assert not result_to_message(6, 0.5, None).outcomes
