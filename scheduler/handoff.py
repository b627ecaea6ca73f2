"""The receiving side of a hand-over: blocks kept for a sequence whose KV comes from a producer.

    RESERVED    blocks are taken; no writer has begun                       waiting clock: lease_s from reserve
    WRITING     a writer may write into them                                moving clock: lease_s from a sign of life
    CANCELLING  the request failed; a write may still land, so blocks stay until the writer is quiet
    ADMITTED    all landed; the blocks passed to the caller                 ended
    FREED       the blocks went back to the pool                            ended

Three verdicts, never one: the request failed (fail, expire), its memory is quiet (quiet), the worker is healthy (not
ours). Once a writer has begun, blocks are freed on the second alone: no clock frees memory that may still be written.

A chunk is told after its transfer is complete, and chunks follow on each other: full blocks of what has landed with the
right digest are quiet by construction (settled). They are prefix content from then on, and when the request fails they
go back at once: whoever reserves for the same tokens, through another producer, holds them already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduler.blocks import BlockPool
from scheduler.config import HandoffConfig
from scheduler.prefix import PrefixCache
from scheduler.reservation import ENDED, TRANSITIONS, Entry, Reservation, ReservationBook, ReservationStage
from spec.errors import ContextTooLong, OutOfBlocks

__all__ = ["ENDED", "TRANSITIONS", "HandoffConfig", "Reservation", "ReservationStage", "Reservations"]

_S = ReservationStage


class Reservations(ReservationBook):
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
        super().__init__(pool, config.tombstones)
        self.config = config
        self._prefix = prefix
        self._consumer = consumer
        self._spare_blocks = spare_blocks

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
        adapter: str = "",
    ) -> Reservation:
        """Takes blocks for the KV of all of `token_ids`, which this producer alone may write.

        Raises ContextTooLong when the sequence can never fit here, OutOfBlocks when there is no room now."""
        self._reservable(len(token_ids))
        hashes = self._prefix.hashes(token_ids, adapter)
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
            group=self.config.group,
            adapter=adapter,
        )
        held_blocks = held_tokens // self._pool.block_tokens
        entry = Entry(reservation, hashes, held_tokens, reservation.expires_s, held_tokens, held_blocks)
        self._live[reservation.reservation_id] = entry
        return reservation

    def _reservable(self, num_tokens: int) -> None:
        assert num_tokens > 0
        limit = min(self.config.max_context_tokens, self._pool.num_blocks * self._pool.block_tokens)
        if num_tokens + 1 > limit:
            message = f"and answer so far are {num_tokens} tokens, and with one more they must fit into {limit}"
            raise ContextTooLong(message, field="prompt")
        if (on_their_way := len(self._clocked())) >= self.config.max_reservations:
            raise OutOfBlocks(f"{on_their_way} hand-overs are on their way already")

    def fail(self, reservation_id: str, reason: str, now_s: float) -> bool:
        """The request failed. Without a writer the blocks are free at once, otherwise those that are settled, and the
        others when it is quiet: CANCELLING.

        False when there was nothing to fail: unknown, ended, or failed before."""
        entry = self._live.get(reservation_id)
        if entry is None or entry.stage is _S.CANCELLING:
            return False
        self._totals["failed"] += 1
        if entry.stage is _S.RESERVED:
            self._free(entry, reason)
        else:
            self._advance(entry, _S.CANCELLING)
            self._return_settled(entry)
        return True

    def expire(self, now_s: float) -> list[str]:
        """Fails those whose lease or deadline ran out, and returns their ids: those that wait for their writer to be
        quiet (CANCELLING; the service stops the writer), and those that had none and are free already."""
        over = [entry.reservation.reservation_id for entry in self._clocked() if entry.expires_s <= now_s]
        for reservation_id in over:
            self.fail(reservation_id, "its lease ran out", now_s)
            self._totals["expired"] += 1
        return over

    def next_expiry_s(self) -> float | None:
        """When expire() has something to do next, if nothing progresses."""
        return min((entry.expires_s for entry in self._clocked()), default=None)

    def _clocked(self) -> list[Entry]:
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

    def settled(self, reservation_id: str, first_token: int, num_tokens: int) -> None:
        """These tokens landed, were found right by their digest and lie where the engine reads them.

        Not to be called for a chunk without a digest: then nothing is proven of it, nor of what comes behind it. A
        reservation that has ended is left alone."""
        entry = self._live.get(reservation_id)
        if entry is None or first_token > entry.settled_tokens:
            return
        entry.settled_tokens = first_token + num_tokens
        assert entry.settled_tokens <= entry.landed_tokens
        full = entry.settled_tokens // self._pool.block_tokens
        if full > entry.settled_blocks:
            self._prefix.publish(entry.block_hashes, entry.reservation.block_ids, entry.settled_blocks, full)
            entry.settled_blocks = full
        if entry.stage is _S.CANCELLING:
            self._return_settled(entry)

    def complete(self, reservation_id: str, now_s: float) -> tuple[int, ...]:
        """All is there. Returns the block table of its `num_tokens` tokens, whose references pass to the caller, for
        Scheduler.adopt; full blocks have become prefix content. Raises as landed() does."""
        entry = self._writing(reservation_id, now_s)
        reservation = entry.reservation
        if entry.landed_tokens < reservation.num_tokens:
            raise self._gap(reservation_id, entry.landed_tokens, reservation.num_tokens)
        self._prefix.publish(entry.block_hashes, reservation.block_ids, 0, len(entry.block_hashes))
        self._bury(entry, _S.ADMITTED, _S.ADMITTED.value)
        return reservation.block_ids

    def quiet(self, reservation_id: str, now_s: float) -> bool:
        """The writer has said, or it is proven, that no write can land any more: the blocks are free.

        False when there was no writer: not begun, unknown or ended."""
        entry = self._live.get(reservation_id)
        if entry is None or entry.stage is _S.RESERVED:
            return False
        self._free(entry, "its writer stopped")
        return True

    def _writing(self, reservation_id: str, now_s: float) -> Entry:
        entry = self._find(reservation_id)
        if entry.stage is not _S.WRITING:
            raise self._refusal("not begun" if entry.stage is _S.RESERVED else "cancelled", reservation_id)
        if entry.expires_s <= now_s:
            raise self._refusal("lease ran out", reservation_id)
        return entry

    def _progress(self, entry: Entry, now_s: float) -> None:
        entry.expires_s = min(now_s + self.config.lease_s, entry.reservation.deadline_s)
