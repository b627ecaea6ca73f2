"""What has to be placed, and what it is once it has workers: one sequence on them, and one line of all they say of it.

router/placer.py finds them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools

from legato.v1 import worker_pb2
from router.registry import Model
from router.worker import Charge, Worker
from spec.errors import HandoffError, LegatoError


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """`worker` is who failed; None: the request's deadline passed."""

    error: LegatoError
    worker: Worker | None


Event = worker_pb2.PrefillEvent | worker_pb2.SequenceOutput | Failure


@dataclasses.dataclass(slots=True)
class Need:
    """What has to be placed. `avoid`: workers that failed this request, taken only where there are no others. `keeper`:
    the decode worker to which a hand-over failed, through the prefill worker's fault as far as can be told: it has kept
    what had landed, and is asked first where another prefill worker goes on."""

    model: Model  # with its adapter, which the sequence names too
    sequence: worker_pb2.SequenceState  # its id is set at each placement
    arrival: int
    was_placed: bool = False  # it, or the answer before it in the same request, has had workers
    avoid: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    keeper: tuple[str, int] | None = None

    def failed(self, placement: Placement, worker: Worker | None, error: LegatoError) -> None:
        """`worker` said so, or was lost. A second hand-over to the same decode worker is not tried a third time."""
        self.avoid.update(start_of(each) for each in placement.workers())
        decode, tried, self.keeper = placement.decode, self.keeper, None
        if decode is None or placement.prefill is None or placement.handed_over or worker is None:
            return
        if (worker is not decode or isinstance(error, HandoffError)) and tried != start_of(decode):
            self.keeper = start_of(decode)

    @property
    def computed_tokens(self) -> int:
        return len(self.sequence.prompt_token_ids) + len(self.sequence.output_token_ids)

    @property
    def total_tokens(self) -> int:
        """KV of the longest that it may become."""
        return len(self.sequence.prompt_token_ids) + self.sequence.sampling.max_tokens

    @property
    def ends_with_next_token(self) -> bool:
        return len(self.sequence.output_token_ids) + 1 >= self.sequence.sampling.max_tokens


class Placement:
    """One sequence on its workers. `events` is all that they say of it, in one line."""

    def __init__(self, sequence: worker_pb2.SequenceState, prefill: Worker | None, decode: Worker | None) -> None:
        self.sequence = sequence
        self.prefill = prefill
        self.decode = decode
        self.reservation: worker_pb2.Reservation | None = None
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.prefill_charge: Charge | None = None
        self.decode_charge: Charge | None = None
        self.handed_over = prefill is None  # the prefill worker is needed no more
        self.target: Placement | None = None  # where it is about to go on; see moves.py
        self.ahead: list[worker_pb2.SequenceOutput] = []  # what the target has said before the sequence is there

    @property
    def sequence_id(self) -> str:
        return self.sequence.sequence_id

    def workers(self) -> list[Worker]:
        return [worker for worker in (self.prefill, self.decode) if worker is not None]

    def open(self, computed_tokens: int, events: asyncio.Queue[Event] | None = None) -> None:
        """Charges the workers, and hears them from here on, in the line of another placement or in one of its own; what
        others said before is forgotten."""
        self.events = asyncio.Queue() if events is None else events
        if self.prefill is not None:
            self.prefill_charge = self.prefill.charge(self.sequence_id, computed_tokens)
        if self.decode is not None:
            self.decode_charge = self.decode.charge(self.sequence_id, computed_tokens)
        for worker in self.workers():
            worker.open_route(self.sequence_id, functools.partial(self._hear, worker))

    def _hear(self, worker: Worker, said: worker_pb2.SequenceOutput | LegatoError) -> None:
        self.events.put_nowait(Failure(said, worker) if isinstance(said, LegatoError) else said)

    def prefill_done(self) -> None:
        if self.prefill_charge is not None:
            self.prefill_charge.release()

    def put_aside(self, output: worker_pb2.SequenceOutput) -> None:
        """It came under another id than ours: of the target, before the sequence is there."""
        if self.target is not None and output.sequence_id == self.target.sequence_id:
            self.ahead.append(output)

    def arrive(self) -> list[worker_pb2.SequenceOutput]:
        """The sequence is on the target from here on, which is charged for all of it. Returns what that has said."""
        target, charge = self.target, self.decode_charge
        assert target is not None and target.decode_charge is not None and charge is not None
        target.decode_charge.add(charge.tokens - target.decode_charge.tokens)
        self.close()
        self.sequence, self.prefill, self.decode = target.sequence, None, target.decode
        self.decode_charge, self.target = target.decode_charge, None
        ahead, self.ahead = self.ahead, []
        return ahead

    def close(self) -> None:
        """Idempotent. What the workers still hold of it is not touched: see Placer.give_up."""
        self.prefill_done()
        if self.decode_charge is not None:
            self.decode_charge.release()
        for worker in self.workers():
            worker.close_route(self.sequence_id)


def start_of(worker: Worker) -> tuple[str, int]:
    """Names this life of the worker."""
    return worker.worker_id, worker.record.epoch
