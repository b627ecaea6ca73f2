"""One answer as the client reads it: a journey's tokens as pieces of text, and how it ended."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator

from legato.v1 import common_pb2, inference_pb2
from router.journey import Drawn, Journey
from router.meter import Meter
from router.registry import Model
from router.text import AnswerText

Response = inference_pb2.GenerateResponse


class Answer:
    """One choice. `resume` are tokens of it that the client has: they are read for their text, and not sent again."""

    def __init__(
        self,
        choice: int,
        journey: Journey,
        model: Model,
        sampling: common_pb2.SamplingParams,
        stops: tuple[str, ...],
        prompt_tokens: int,
        resume: list[int],
        received_s: float,
        meter: Meter,
    ) -> None:
        self._choice = choice
        self._journey = journey
        self._model = model
        self._sampling = sampling
        self._text = AnswerText(model.tokenizer.stream(), stops)
        self._usage = inference_pb2.Usage(prompt_tokens=prompt_tokens)
        self._resume = resume
        self._last_token_s = received_s
        self._meter = meter
        self._pieces = 0

    async def responses(self) -> AsyncGenerator[Response, None]:
        """Pieces, Finished with the last. Raises what the journey raises. Use with contextlib.aclosing."""
        if reason := self._take_up():
            yield Response(finished=self._finished(reason))
            return
        async with contextlib.aclosing(self._journey.run()) as journey:
            async for drawn in journey:
                response = Response(piece=self._piece(drawn))
                reason = common_pb2.FINISH_REASON_STOP if self._text.stop_string else drawn.finish_reason
                if reason:
                    response.finished.CopyFrom(self._finished(reason))
                yield response
                if reason:
                    return  # a stop string ends the journey here: closing it stops the decode worker

    def _take_up(self) -> common_pb2.FinishReason:
        """Reads the tokens the client has. They may hold the end already: then only Finished was lost on the way."""
        for token_id in self._resume:
            self._usage.completion_tokens += 1
            self._push(token_id)
            if self._text.stop_string:
                return common_pb2.FINISH_REASON_STOP
        if self._resume and (self._resume[-1] in self._sampling.stop_token_ids or self._ends(self._resume[-1])):
            return common_pb2.FINISH_REASON_STOP
        if len(self._resume) >= self._sampling.max_tokens:
            return common_pb2.FINISH_REASON_LENGTH
        return common_pb2.FINISH_REASON_UNSPECIFIED

    def _ends(self, token_id: int) -> bool:
        return token_id in self._model.eos_token_ids and not self._sampling.ignore_eos

    def _push(self, token_id: int) -> str:
        """The end token is no part of the text, whether or not the tokenizer flags it special."""
        return "" if self._ends(token_id) else self._text.push(token_id)

    def _piece(self, drawn: Drawn) -> Response.Piece:
        self._measure()
        piece = Response.Piece(
            choice=self._choice, first_index=drawn.first_index, prompt_logprobs=drawn.prompt_logprobs
        )
        text = []
        for token in drawn.tokens:
            piece.tokens.append(token)
            text.append(self._push(token.token_id))
            if self._text.stop_string:
                break
        piece.text = "".join(text)
        self._usage.completion_tokens += len(piece.tokens)
        self._usage.proposed_tokens += drawn.proposed_tokens
        self._usage.accepted_tokens += drawn.accepted_tokens
        self._pieces += 1
        if self._pieces <= 2:
            piece.stages.CopyFrom(self._journey.ledger.times)
        return piece

    def _measure(self) -> None:
        now_s = time.monotonic()
        if self._pieces:
            self._meter.gap(now_s - self._last_token_s)
        elif not self._resume and self._choice == 0:
            self._meter.first_token(now_s - self._last_token_s)
        self._last_token_s = now_s

    def _finished(self, reason: common_pb2.FinishReason) -> Response.Finished:
        rest = self._text.finish()
        if self._text.stop_string:
            reason = common_pb2.FINISH_REASON_STOP
        ledger = self._journey.ledger
        return Response.Finished(
            choice=self._choice,
            reason=reason,
            usage=self._usage,
            stages=ledger.times,
            route=ledger.route,
            text=rest,
            stop_string=self._text.stop_string,
        )
