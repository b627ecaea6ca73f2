"""Step plans and their results, as rank 0 and the other ranks exchange them (protos/legato/v1/rank.proto).

A sequence's sampling parameters are the same in every step: their bytes are made once, and read once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from legato.v1 import common_pb2, rank_pb2
from scheduler.plan import Draw, Drawn, Slice, StepPlan, StepResult
from service.messages import logprobs_from_proto, logprobs_to_proto, sampling_from_proto, sampling_to_proto
from spec.sampling import SamplingParams

KNOWN_PARAMS = 4096  # sequences whose sampling parameters are remembered


class PlanWriter:
    """Used by one thread."""

    def __init__(self) -> None:
        self._params: dict[int, tuple[SamplingParams, bytes]] = {}  # by identity, which the reference keeps

    def write(self, step: int, plan: StepPlan, layer_ends: Sequence[int] = ()) -> rank_pb2.RankPlan:
        """`step`: the number under which its result will come. `layer_ends`: of groups of the model's layers; a rank
        tells when it has written its own of each."""
        slices = [self._slice(piece) for piece in plan.slices]
        return rank_pb2.RankPlan(step=step, slices=slices, layer_ends=layer_ends)

    def _slice(self, piece: Slice) -> rank_pb2.RankPlan.Slice:
        draw = piece.draw
        assert piece.proposal is None, "rank 0 has guessed before it tells the others"
        return rank_pb2.RankPlan.Slice(
            sequence_id=piece.sequence_id,
            token_ids=piece.token_ids,
            start=piece.start,
            block_table=piece.block_table,
            draw=None
            if draw is None
            else rank_pb2.RankPlan.Draw(
                params=self._params_of(draw.params),
                position=draw.position,
                prompt_tokens=draw.prompt_tokens,
                history=draw.history,
            ),
            prompt_logprobs=piece.prompt_logprobs,
            prompt_targets=piece.prompt_targets,
            adapter=piece.adapter,
            guessed_token_ids=piece.guessed_token_ids,
        )

    def _params_of(self, params: SamplingParams) -> bytes:
        if (known := self._params.get(id(params))) is None:
            if len(self._params) >= KNOWN_PARAMS:
                self._params.clear()
            written = sampling_to_proto(params).SerializeToString(deterministic=True)
            known = self._params[id(params)] = params, written
        return known[1]


def plan_from_message(message: rank_pb2.RankPlan) -> StepPlan:
    return StepPlan(message.step, tuple(_slice_from(piece) for piece in message.slices))


def _slice_from(piece: rank_pb2.RankPlan.Slice) -> Slice:
    draw = None
    if piece.HasField("draw"):
        of = piece.draw
        draw = Draw(_params_from(of.params), of.position, of.prompt_tokens, tuple(of.history))
    return Slice(
        sequence_id=piece.sequence_id,
        token_ids=tuple(piece.token_ids),
        start=piece.start,
        block_table=tuple(piece.block_table),
        draw=draw,
        prompt_logprobs=piece.prompt_logprobs if piece.HasField("prompt_logprobs") else None,
        prompt_targets=tuple(piece.prompt_targets),
        adapter=piece.adapter,
        guessed_token_ids=tuple(piece.guessed_token_ids),
    )


@functools.lru_cache(maxsize=KNOWN_PARAMS)
def _params_from(written: bytes) -> SamplingParams:
    return sampling_from_proto(common_pb2.SamplingParams.FromString(written))


def result_to_message(step: int, busy_s: float, result: StepResult | None) -> rank_pb2.RankResult:
    """None: of a rank whose draws nobody reads."""
    message = rank_pb2.RankResult(step=step, busy_s=busy_s)
    if result is not None:
        for drawn, scored in zip(result.drawn, result.prompt_logprobs, strict=True):
            outcome = message.outcomes.add()
            for each in drawn:
                added = outcome.drawn.add(token_id=each.token_id, completes=each.completes, refusal=each.refusal)
                if each.logprobs is not None:
                    added.logprobs.CopyFrom(logprobs_to_proto(each.logprobs))
            outcome.prompt_logprobs.extend(logprobs_to_proto(entry) for entry in scored)
    return message


def result_from_message(message: rank_pb2.RankResult) -> StepResult:
    drawn = (tuple(map(_drawn_from, outcome.drawn)) for outcome in message.outcomes)
    scored = (tuple(map(logprobs_from_proto, outcome.prompt_logprobs)) for outcome in message.outcomes)
    return StepResult(tuple(drawn), tuple(scored))


def _drawn_from(message: rank_pb2.RankResult.Drawn) -> Drawn:
    logprobs = logprobs_from_proto(message.logprobs) if message.HasField("logprobs") else None
    return Drawn(message.token_id, logprobs, message.completes, message.refusal)
