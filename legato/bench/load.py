"""Sends requests and writes down what comes back.

An open loop sends when requests are due, whatever became of those before, and counts from when they were due: a server
that stalls is charged for everyone who came meanwhile. (Where the next request waits for an answer, a stall hides the
requests that it kept away: coordinated omission, Tene 2013.) A closed loop keeps a number of requests in flight, as
that many users would who each wait for their answer; it says what they see, and nothing of arrivals at a rate.

The clock is the event loop's, which is monotonic; a test runs the same code in virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from legato.bench.arrivals import Arrival
from legato.bench.prompts import PromptBook
from legato.bench.record import Record
from legato.errors import LegatoError

HEARTBEAT_S = 0.02
PAUSE_AFTER_FAILURE_S = 0.1  # of a closed loop's user: a cluster that refuses at once is not hammered


@dataclasses.dataclass(frozen=True, slots=True)
class Sending:
    """How each request is sent. `ignore_eos`: answers are exactly as long as asked for."""

    model: str
    temperature: float
    speculation: str | None
    ignore_eos: bool
    timeout_s: float
    seed: int


class Load:
    """One load on one cluster. `client` is a legato.AsyncClient that does not send again what failed.

    records     of everything sent, in order; an unfinished one has no `ended_s`
    delays_s    of the event loop, every HEARTBEAT_S: so late can a time be that was written down
    ended_s     when the last answer ended, or the load was stopped
    """

    def __init__(self, client: Any, book: PromptBook, sending: Sending, first_index: int = 0) -> None:
        self._client = client
        self._book = book
        self._sending = sending
        self._next_index = first_index
        self._start_s = 0.0
        self.records: list[Record] = []
        self.delays_s: list[float] = []
        self.ended_s = 0.0
        self.finished = 0
        self.failed = 0
        self.output_tokens = 0

    @property
    def elapsed_s(self) -> float:
        return asyncio.get_running_loop().time() - self._start_s

    async def open_loop(self, arrivals: Iterable[Arrival]) -> None:
        """Until every answer has ended. Cancelling it cancels what is in flight."""
        async with self._running(), asyncio.TaskGroup() as answers:
            for index, arrival in self._numbered(arrivals):
                prompt = self._book.prompt(index, arrival)  # before it is due
                await asyncio.sleep(arrival.at_s - self.elapsed_s)
                answers.create_task(self._ask(index, arrival, prompt, arrival.at_s))
                await asyncio.sleep(0)  # it is sent before the next prompt is made

    async def closed_loop(self, arrivals: Iterable[Arrival], concurrency: int, duration_s: float | None = None) -> None:
        """Begins requests until the arrivals are used up or `duration_s` have passed; then until the last answer."""
        numbered = self._numbered(arrivals)
        async with self._running(), asyncio.TaskGroup() as users:
            for _ in range(concurrency):
                users.create_task(self._user(numbered, duration_s))

    async def _user(self, numbered: Iterator[tuple[int, Arrival]], duration_s: float | None) -> None:
        for index, arrival in numbered:
            if duration_s is not None and self.elapsed_s >= duration_s:
                return
            record = await self._ask(index, arrival, self._book.prompt(index, arrival), None)
            if record.error is not None:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    async def _ask(self, index: int, arrival: Arrival, prompt: Any, due_s: float | None) -> Record:
        sent_s = self.elapsed_s
        record = Record(index, sent_s if due_s is None else due_s, sent_s, arrival.output_tokens)
        self.records.append(record)
        stream = None
        try:
            stream = self._open(prompt, record)
            async with stream:
                async for piece in stream:
                    if piece.token_ids:
                        record.pieces.append((self.elapsed_s, len(piece.token_ids)))
                        self.output_tokens += len(piece.token_ids)
            self.finished += 1
        except LegatoError as error:
            record.error = error.with_traceback(None)  # frames would keep the whole request alive
            self.failed += 1
        finally:
            if stream is not None:
                answer = stream.answer
                record.prompt_tokens = answer.usage.prompt_tokens
                record.proposed_tokens, record.accepted_tokens = (
                    answer.usage.proposed_tokens,
                    answer.usage.accepted_tokens,
                )
                record.ledger, record.route = answer.ledger, answer.route
        record.ended_s = self.elapsed_s
        return record

    def _open(self, prompt: Any, record: Record) -> Any:
        sending = self._sending
        is_chat = isinstance(prompt, list) and isinstance(prompt[0], dict)
        return (self._client.stream_chat if is_chat else self._client.stream)(
            prompt,
            model=sending.model,
            max_tokens=record.asked_tokens,
            temperature=sending.temperature,
            speculation=sending.speculation,
            ignore_eos=sending.ignore_eos,
            seed=(sending.seed + record.index) % (1 << 64),
            timeout_s=sending.timeout_s,
        )

    def _numbered(self, arrivals: Iterable[Arrival]) -> Iterator[tuple[int, Arrival]]:
        for arrival in arrivals:
            self._next_index += 1
            yield self._next_index - 1, arrival

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        self._start_s = asyncio.get_running_loop().time()
        heartbeat = asyncio.create_task(self._listen_to_heart())
        try:
            yield
        finally:
            self.ended_s = self.elapsed_s
            heartbeat.cancel()

    async def _listen_to_heart(self) -> None:
        while True:
            due_s = self.elapsed_s + HEARTBEAT_S
            await asyncio.sleep(HEARTBEAT_S)
            self.delays_s.append(max(0.0, self.elapsed_s - due_s))
