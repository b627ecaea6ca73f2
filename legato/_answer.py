"""Puts an answer together from the messages of a stream, and holds the stream to its promise: token indices run from 0
without gap or repeat, also when the stream was broken and sent again."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from legato._ledger import BEFORE_FIRST_TOKEN, BEFORE_SECOND_TOKEN, ledger_of
from legato.errors import InternalError
from legato.types import Answer, Choice, FinishReason, Piece, Route, TokenLogprobs, Transfer, Usage
from legato.v1 import common_pb2, inference_pb2

_FINISH: dict[int, FinishReason] = {common_pb2.FINISH_REASON_STOP: "stop", common_pb2.FINISH_REASON_LENGTH: "length"}


class _Choice:
    """One choice so far."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.stages: dict[str, int] = {}
        self.first_token_after_ns: int | None = None
        self.second_token_after_ns: int | None = None
        self.last_token_after_ns = 0
        self.finished: inference_pb2.GenerateResponse.Finished | None = None
        self.finished_in_send = 0

    def note_stages(self, times: common_pb2.StageTimes) -> None:
        """The first send that passed a boundary keeps it: what came later is the time that the failover took."""
        for name in (*BEFORE_FIRST_TOKEN, *BEFORE_SECOND_TOKEN):
            passed_ns = getattr(times, name)
            if passed_ns:
                self.stages.setdefault(name, passed_ns)

    def note_arrival(self, after_ns: int) -> None:
        if self.first_token_after_ns is None and self.token_ids:
            self.first_token_after_ns = after_ns
        if self.second_token_after_ns is None and len(self.token_ids) > 1:
            self.second_token_after_ns = after_ns
        self.last_token_after_ns = after_ns

    def view(self, sent_unix_ns: int, prompt_tokens: int, sends: int, wants_logprobs: bool) -> Choice:
        finished, ledger = self.finished, None
        usage = Usage(prompt_tokens, len(self.token_ids))
        if finished:
            told = finished.usage
            usage = Usage(told.prompt_tokens, told.completion_tokens, told.proposed_tokens, told.accepted_tokens)
        if self.first_token_after_ns is not None:
            ledger = ledger_of(self.stages, sent_unix_ns, self.first_token_after_ns, self.second_token_after_ns)
        return Choice(
            index=self.index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            finish_reason=_FINISH.get(finished.reason) if finished else None,
            stop_string=finished.stop_string or None if finished else None,
            logprobs=tuple(self.logprobs) if wants_logprobs else None,
            usage=usage,
            route=_route(finished.route, sends) if finished else None,
            ledger=ledger,
        )


class Assembly:
    """The answer to one request, over all its sends. Times are nanoseconds after sending, by the monotonic clock."""

    def __init__(self, options: inference_pb2.AnswerOptions, sent_unix_ns: int) -> None:
        self._options = options
        self._sent_unix_ns = sent_unix_ns
        self._choices = [_Choice(index) for index in range(options.n)]
        self._started: inference_pb2.GenerateResponse.Started | None = None
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._send = 1

    @property
    def num_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices)

    @property
    def is_finished(self) -> bool:
        return all(choice.finished for choice in self._choices)

    def feed(self, response: inference_pb2.GenerateResponse, after_ns: int) -> Piece | None:
        """Takes one message; returns what it adds, if anything. Raises InternalError when the promise is broken."""
        if response.HasField("started"):
            self._started = response.started
        piece = self._feed_piece(response.piece, after_ns) if response.HasField("piece") else None
        if not response.HasField("finished"):
            return piece
        rest = self._feed_finished(response.finished)
        if piece is None or rest is None:
            return piece or rest
        return dataclasses.replace(piece, text=piece.text + rest.text)

    def end(self) -> None:
        """The stream ended without an error. Raises InternalError when a choice has no end."""
        open_choices = [choice.index for choice in self._choices if not choice.finished]
        if open_choices:
            raise InternalError(f"the stream ended before choice {open_choices[0]} was finished")

    def prepare_resume(self, options: inference_pb2.AnswerOptions) -> None:
        """Writes into the options of the next send what this side has: the tokens, and the seed that drew them."""
        self._send += 1
        del options.resume[:]
        if self.num_tokens:
            options.resume.extend(inference_pb2.TokenIds(ids=choice.token_ids) for choice in self._choices)
        if self._started is not None:
            options.sampling.seed = self._started.seed

    def answer(self, request_id: str) -> Answer:
        """What there is so far."""
        started, sampling = self._started, self._options.sampling
        prompt_token_ids = tuple(started.prompt_token_ids) if started else ()
        return Answer(
            request_id=started.request_id or request_id if started else request_id,
            model=started.model if started else "",
            seed=started.seed if started else None,
            prompt_token_ids=prompt_token_ids,
            prompt_logprobs=tuple(self._prompt_logprobs) if sampling.HasField("prompt_logprobs") else None,
            choices=tuple(
                choice.view(self._sent_unix_ns, len(prompt_token_ids), self._send, sampling.HasField("logprobs"))
                for choice in self._choices
            ),
            duration_s=max(choice.last_token_after_ns for choice in self._choices) / 1e9,
        )

    def _choice(self, index: int) -> _Choice:
        if index >= len(self._choices):
            raise InternalError(f"the stream holds choice {index}, {len(self._choices)} were asked for")
        return self._choices[index]

    def _feed_piece(self, piece: inference_pb2.GenerateResponse.Piece, after_ns: int) -> Piece | None:
        choice = self._choice(piece.choice)
        if choice.finished and choice.finished_in_send < self._send:
            return None  # had ended before the stream was sent again
        due = len(choice.token_ids)
        if choice.finished or (piece.tokens and piece.first_index != due):
            wanted = "the end was" if choice.finished else f"{due} was due"
            raise InternalError(
                f"token {piece.first_index} of choice {piece.choice} came where {wanted}",
                details={"expected": str(due), "got": str(piece.first_index)},
            )
        token_ids = tuple(token.token_id for token in piece.tokens)
        logprobs = None
        if self._options.sampling.HasField("logprobs"):
            logprobs = tuple(_logprobs(token.token_id, token.logprobs) for token in piece.tokens)
            choice.logprobs.extend(logprobs)
        choice.token_ids.extend(token_ids)
        choice.texts.append(piece.text)
        choice.note_stages(piece.stages)
        choice.note_arrival(after_ns)
        self._note_prompt_logprobs(piece.prompt_logprobs)
        return Piece(piece.text, token_ids, due, logprobs, piece.choice)

    def _feed_finished(self, finished: inference_pb2.GenerateResponse.Finished) -> Piece | None:
        choice = self._choice(finished.choice)
        if choice.finished:
            if choice.finished_in_send < self._send:
                return None
            raise InternalError(f"choice {finished.choice} was finished twice")
        choice.finished, choice.finished_in_send = finished, self._send
        choice.note_stages(finished.stages)
        if not finished.text:
            return None
        choice.texts.append(finished.text)
        logprobs = () if self._options.sampling.HasField("logprobs") else None
        return Piece(finished.text, (), len(choice.token_ids), logprobs, finished.choice)

    def _note_prompt_logprobs(self, entries: Iterable[common_pb2.TokenLogprobs]) -> None:
        if self._prompt_logprobs or self._started is None:
            return
        prompt_tokens = self._started.prompt_token_ids[1:]
        self._prompt_logprobs = [
            _logprobs(token_id, one) for token_id, one in zip(prompt_tokens, entries, strict=False)
        ]


def _logprobs(token_id: int, entry: common_pb2.TokenLogprobs) -> TokenLogprobs:
    top = dict(zip(entry.top_token_ids, entry.top_logprobs, strict=False))
    return TokenLogprobs(token_id, entry.logprob, top)


def _route(route: common_pb2.Route, sends: int) -> Route:
    moved = route.transfer
    transfer = None
    if moved.transport:
        transfer = Transfer(
            transport=moved.transport,
            moved_bytes=moved.bytes,
            pieces=moved.pieces,
            sent_tokens=moved.sent_tokens,
            skipped_tokens=moved.skipped_tokens,
            moving_s=moved.moving_s,
        )
    return Route(
        router_id=route.router_id,
        prefill_worker_id=route.prefill_worker_id,
        decode_worker_id=route.decode_worker_id,
        attempts=route.attempts,
        moves=route.moves,
        sends=sends,
        prefill_cached_tokens=route.prefill_cached_tokens,
        transfer=transfer,
    )
