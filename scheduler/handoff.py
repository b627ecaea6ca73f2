"""The receiving side of a hand-over: blocks kept for a sequence whose KV comes from a producer.

    RESERVED    blocks are taken; no writer has begun                       waiting clock: lease_s from reserve
    WRITING     a writer may write into them                                moving clock: lease_s from a sign of life
    CANCELLING  the request failed; a write may still land, so the blocks stay until the writer is quiet
    ADMITTED    all landed; the blocks passed to the caller                 ended
    FREED       the blocks went back to the pool                            ended

Three verdicts, never one: the request failed (fail, expire), its memory is quiet (quiet), the worker is healthy (not
ours). Once a writer has begun, blocks are freed on the second alone: no clock frees memory that may still be written.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Callable, Sequence

from scheduler.blocks import BlockPool, count_references
from scheduler.prefix import PrefixCache
from spec.errors import ContextTooLong, Draining, InvalidConfiguration, OutOfBlocks, TicketRefused, TransferFailed


class ReservationStage(enum.Enum):
    RESERVED = "reserved"
    WRITING = "writing"
    CANCELLING = "cancelling"
    ADMITTED = "admitted"
    FREED = "freed"


_S = ReservationStage
TRANSITIONS: dict[ReservationStage, frozenset[ReservationStage]] = {
    _S.RESERVED: frozenset({_S.WRITING, _S.FREED}),
    _S.WRITING: frozenset({_S.ADMITTED, _S.CANCELLING, _S.FREED}),
    _S.CANCELLING: frozenset({_S.FREED}),
    _S.ADMITTED: frozenset(),
    _S.FREED: frozenset(),
}
ENDED = frozenset({_S.ADMITTED, _S.FREED})


@dataclasses.dataclass(frozen=True, slots=True)
class HandoffConfig:
    max_reservations: int
    max_context_tokens: int  # a sequence must have room for one more token than is handed over
    lease_s: float = 5.0
    tombstones: int = 4096  # ended reservations of which it is remembered how they ended

    def __post_init__(self) -> None:
        if self.max_reservations < 1 or self.tombstones < 1 or not self.lease_s > 0:
            raise InvalidConfiguration("max_reservations, tombstones and lease_s must be above 0")


@dataclasses.dataclass(frozen=True, slots=True)
class Reservation:
    """What a ticket is made of. Tokens [held_tokens, num_tokens) are to come; those before are in the prefix cache."""

    reservation_id: str
    sequence_id: str
    producer_id: str
    producer_epoch: int
    block_ids: tuple[int, ...]  # of positions [0, num_tokens)
    generations: tuple[int, ...]
    held_tokens: int
    num_tokens: int
    deadline_s: float
    expires_s: float  # when the waiting clock runs out


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    reservation: Reservation
    block_hashes: list[bytes]
    landed_tokens: int  # positions [0, landed_tokens) are there and verified
    expires_s: float
    stage: ReservationStage = ReservationStage.RESERVED


class Reservations:
    """Owned by a decode worker, beside its Scheduler and on the same pool; called by one at a time.

    `consumer` names this worker in this life (id and epoch), so that no reservation id comes twice. `spare_blocks` says
    how many blocks may be taken, which is none while the scheduler's own sequences wait for some.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix: PrefixCache,
        config: HandoffConfig,
        consumer: str,
        spare_blocks: Callable[[], int],
    ) -> None:
        self.config = config
        self.draining = False  # set by the owner: nothing new is reserved, what is there goes on
        self.refused: collections.Counter[str] = collections.Counter()  # tickets and chunks refused, by reason
        self._pool = pool
        self._prefix = prefix
        self._consumer = consumer
        self._spare_blocks = spare_blocks
        self._live: dict[str, _Entry] = {}
        self._tombstones: collections.OrderedDict[str, str] = collections.OrderedDict()  # id -> how it ended
        self._totals: collections.Counter[str] = collections.Counter()

    # ---- the request's side ----------------------------------------------------------------------------------------

    def reserve(
        self,
        sequence_id: str,
        token_ids: Sequence[int],
        *,
        producer_id: str,
        producer_epoch: int,
        deadline_s: float,
        now_s: float,
    ) -> Reservation:
        """Takes blocks for the KV of all of `token_ids`, which this producer alone may write.

        Raises Draining, ContextTooLong when the sequence can never fit here, OutOfBlocks when there is no room now."""
        self._reservable(len(token_ids))
        hashes = self._prefix.hashes(token_ids)
        blocks = self._prefix.match(token_ids, hashes)
        held_tokens = len(blocks) * self._pool.block_tokens
        missing = self._pool.blocks_for(len(token_ids)) - len(blocks)
        if missing > (spare := self._spare_blocks()):
            self._pool.release(blocks)
            raise OutOfBlocks(f"{missing} KV blocks are wanted, {spare} may be reserved now")
        blocks += self._pool.allocate(missing)
        self._totals["reserved"] += 1
        reservation = Reservation(
            reservation_id=f"{self._consumer}/{self._totals['reserved']}",
            sequence_id=sequence_id,
            producer_id=producer_id,
            producer_epoch=producer_epoch,
            block_ids=tuple(blocks),
            generations=tuple(self._pool.generation(block) for block in blocks),
            held_tokens=held_tokens,
            num_tokens=len(token_ids),
            deadline_s=deadline_s,
            expires_s=min(now_s + self.config.lease_s, deadline_s),
        )
        self._live[reservation.reservation_id] = _Entry(reservation, hashes, held_tokens, reservation.expires_s)
        return reservation

    def _reservable(self, num_tokens: int) -> None:
        assert num_tokens > 0
        if self.draining:
            raise Draining(f"{self._consumer} reserves nothing new")
        limit = min(self.config.max_context_tokens, self._pool.num_blocks * self._pool.block_tokens)
        if num_tokens + 1 > limit:
            message = f"and answer so far are {num_tokens} tokens, and with one more they must fit into {limit}"
            raise ContextTooLong(message, field="prompt")
        if len(self._live) >= self.config.max_reservations:
            raise OutOfBlocks(f"{len(self._live)} hand-overs are on their way already")

    def fail(self, reservation_id: str, reason: str, now_s: float) -> bool:
        """The request failed. Without a writer the blocks are free at once, otherwise when it is quiet: CANCELLING.

        False when there was nothing to fail: unknown, ended, or failed before."""
        entry = self._live.get(reservation_id)
        if entry is None or entry.stage is _S.CANCELLING:
            return False
        self._totals["failed"] += 1
        if entry.stage is _S.RESERVED:
            self._free(entry, reason)
        else:
            self._advance(entry, _S.CANCELLING)
        return True

    def expire(self, now_s: float) -> list[str]:
        """Fails those whose lease or deadline ran out, and returns their ids: those that wait for their writer to be
        quiet (stage_of is CANCELLING; the service stops the writer), and those that had none and are free already."""
        over = [entry.reservation.reservation_id for entry in self._clocked() if entry.expires_s <= now_s]
        for reservation_id in over:
            self.fail(reservation_id, "its lease ran out", now_s)
            self._totals["expired"] += 1
        return over

    def next_expiry_s(self) -> float | None:
        """When expire() has something to do next, if nothing progresses."""
        return min((entry.expires_s for entry in self._clocked()), default=None)

    def _clocked(self) -> list[_Entry]:
        return [entry for entry in self._live.values() if entry.stage is not _S.CANCELLING]

    # ---- the writer's side -----------------------------------------------------------------------------------------

    def begin(
        self,
        reservation_id: str,
        *,
        sequence_id: str,
        producer_id: str,
        producer_epoch: int,
        block_ids: Sequence[int],
        generations: Sequence[int],
        now_s: float,
    ) -> None:
        """The producer may write from here on. Raises TicketRefused, counted, where anything is not as reserved."""
        entry = self._find(reservation_id)
        reservation = entry.reservation
        wrong = {
            "begun before": entry.stage is not _S.RESERVED,
            "lease ran out": entry.expires_s <= now_s,
            "other sequence": sequence_id != reservation.sequence_id,
            "other producer": producer_id != reservation.producer_id,
            "other epoch": producer_epoch != reservation.producer_epoch,
            "other blocks": tuple(block_ids) != reservation.block_ids,
            "stale generation": tuple(generations) != reservation.generations,
        }
        for reason, applies in wrong.items():
            if applies:
                raise self._refusal(reason, reservation_id)
        self._advance(entry, _S.WRITING)
        self._progress(entry, now_s)

    def renew(self, reservation_id: str, now_s: float) -> None:
        """The producer has it in line or computes it: the moving clock starts anew. Raises as landed() does."""
        self._progress(self._writing(reservation_id, now_s), now_s)

    def landed(self, reservation_id: str, first_token: int, num_tokens: int, now_s: float) -> None:
        """Tokens [first_token, first_token + num_tokens) are there, and their digest was found right.

        In order, each once: raises TicketRefused for a repeated, late or overlong chunk, TransferFailed for a gap."""
        entry = self._writing(reservation_id, now_s)
        if first_token > entry.landed_tokens:
            raise self._gap(reservation_id, entry.landed_tokens, first_token)
        if first_token < entry.landed_tokens or num_tokens < 1:
            raise self._refusal("repeated chunk", reservation_id)
        if first_token + num_tokens > entry.reservation.num_tokens:
            raise self._refusal("overlong chunk", reservation_id)
        entry.landed_tokens = first_token + num_tokens
        self._progress(entry, now_s)

    def complete(self, reservation_id: str, now_s: float) -> tuple[int, ...]:
        """All is there. Returns the block table of its `num_tokens` tokens, whose references pass to the caller, for
        Scheduler.adopt; full blocks have become prefix content. Raises as landed() does."""
        entry = self._writing(reservation_id, now_s)
        reservation = entry.reservation
        if entry.landed_tokens < reservation.num_tokens:
            raise self._gap(reservation_id, entry.landed_tokens, reservation.num_tokens)
        self._prefix.publish(entry.block_hashes, reservation.block_ids, 0, len(entry.block_hashes))
        self._bury(entry, _S.ADMITTED, "admitted")
        return reservation.block_ids

    def quiet(self, reservation_id: str, now_s: float) -> bool:
        """The writer has said, or it is proven, that no write can land any more: the blocks are free.

        False when there was no writer: not begun, unknown or ended."""
        entry = self._live.get(reservation_id)
        if entry is None or entry.stage is _S.RESERVED:
            return False
        self._free(entry, "its writer stopped")
        return True

    # ---- within ----------------------------------------------------------------------------------------------------

    def _find(self, reservation_id: str) -> _Entry:
        if (entry := self._live.get(reservation_id)) is None:
            reason = "ended" if reservation_id in self._tombstones else "unknown"
            raise self._refusal(reason, reservation_id, self._tombstones.get(reservation_id, ""))
        return entry

    def _writing(self, reservation_id: str, now_s: float) -> _Entry:
        entry = self._find(reservation_id)
        if entry.stage is not _S.WRITING:
            raise self._refusal("not begun" if entry.stage is _S.RESERVED else "cancelled", reservation_id)
        if entry.expires_s <= now_s:
            raise self._refusal("lease ran out", reservation_id)
        return entry

    def _refusal(self, reason: str, reservation_id: str, how_it_ended: str = "") -> TicketRefused:
        self.refused[reason] += 1
        suffix = f" ({how_it_ended})" if how_it_ended else ""
        return TicketRefused(f"reservation {reservation_id}: {reason}{suffix}", reservation_id=reservation_id)

    def _gap(self, reservation_id: str, first_token: int, end_token: int) -> TransferFailed:
        self.refused["gap"] += 1
        return TransferFailed(f"tokens {first_token} to {end_token} did not come", reservation_id=reservation_id)

    def _progress(self, entry: _Entry, now_s: float) -> None:
        entry.expires_s = min(now_s + self.config.lease_s, entry.reservation.deadline_s)

    def _advance(self, entry: _Entry, to: ReservationStage) -> None:
        assert to in TRANSITIONS[entry.stage], f"no reservation goes from {entry.stage.value} to {to.value}"
        entry.stage = to

    def _free(self, entry: _Entry, how_it_ended: str) -> None:
        self._pool.release(entry.reservation.block_ids)
        self._bury(entry, _S.FREED, how_it_ended)

    def _bury(self, entry: _Entry, to: ReservationStage, how_it_ended: str) -> None:
        self._advance(entry, to)
        del self._live[entry.reservation.reservation_id]
        self._tombstones[entry.reservation.reservation_id] = how_it_ended
        while len(self._tombstones) > self.config.tombstones:
            self._tombstones.popitem(last=False)
        self._totals[to.value] += 1

    # ---- what is here ----------------------------------------------------------------------------------------------

    def stage_of(self, reservation_id: str) -> ReservationStage | None:
        """Of a live reservation; None: unknown or ended."""
        entry = self._live.get(reservation_id)
        return None if entry is None else entry.stage

    def reserved_blocks(self) -> int:
        return sum(len(entry.reservation.block_ids) for entry in self._live.values())

    def counts(self) -> dict[str, int]:
        """What must be zero when nothing runs (P3)."""
        stages = collections.Counter(entry.stage for entry in self._live.values())
        live = {f"reservations_{stage.value}": stages[stage] for stage in _S if stage not in ENDED}
        return {**live, "reserved_blocks": self.reserved_blocks()}

    def totals(self) -> dict[str, int]:
        """What only grows."""
        names = ("reserved", "admitted", "freed", "failed", "expired")
        return {**{name: self._totals[name] for name in names}, "refused": self.refused.total()}

    def references(self) -> collections.Counter[int]:
        """References on blocks that reservations hold."""
        return count_references(entry.reservation.block_ids for entry in self._live.values())

    def check(self) -> None:
        """Asserts the invariants."""
        assert all(self._pool.references(block) >= count for block, count in self.references().items())
        for entry in self._live.values():
            reservation = entry.reservation
            assert entry.stage not in ENDED
            assert reservation.held_tokens <= entry.landed_tokens <= reservation.num_tokens
            assert reservation.generations == tuple(self._pool.generation(block) for block in reservation.block_ids)
        assert not self._live.keys() & self._tombstones.keys()
        assert len(self._tombstones) <= self.config.tombstones
