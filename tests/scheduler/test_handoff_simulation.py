"""Hand-overs in a simulated world: a consumer, two producers, a network and a clock, with seeded faults.

    messages   lost, repeated, late, out of order          writes      land late, one by one, also after a failure
    producers  crash, restart with another epoch           requests    are aborted, run out of time, come again
    blocks     are few: local sequences compete, get preempted, share prefixes

The world keeps its own account of what is true, and holds the reservations to it:
    - a write that its producer was allowed to make never lands in a block that was given away
    - a writer is let in once, with the ticket of a live reservation, in the life that the ticket was issued for
    - what failed stays failed; what is admitted has every token's KV, and its answer is the oracle's
    - when all is over, everything has ended and nothing is held
A seed replays exactly. The last tests plant faults in Reservations and ask that some seed finds each of them.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from scheduler.batch import Failed, Scheduler, SchedulerConfig, Tokens
from scheduler.handoff import ENDED, HandoffConfig, Reservation, Reservations, ReservationStage
from scheduler.sequence import Sequence
from spec.errors import LegatoError, OutOfBlocks, TicketRefused, TransferFailed
from spec.sampling import SamplingParams

FAULTS_END_S = 12.0
PATIENCE_S = 80.0
BLOCK_TOKENS = 4


@dataclasses.dataclass
class Job:
    """One placement of a request on the consumer, and what became of it."""

    name: str
    prompt: tuple[int, ...]
    params: SamplingParams
    output: list[int]  # the first token, drawn by the producer
    deadline_s: float
    reservation: Reservation | None = None
    stream: int | None = None  # whom the consumer let in
    ended: str | None = None
    sequence: Sequence | None = None

    @property
    def reservation_id(self) -> str:
        assert self.reservation is not None
        return self.reservation.reservation_id


@dataclasses.dataclass
class Writer:
    """A producer's end of one hand-over stream."""

    job: Job
    epoch: int
    stopped: bool = False
    posted_tokens: int = 0
    in_flight: int = 0
    last_delivery_s: float = 0.0


@dataclasses.dataclass
class Producer:
    name: str
    epoch: int = 1
    up: bool = True
    writers: dict[int, Writer] = dataclasses.field(default_factory=dict)


class World:
    def __init__(self, seed: int, fake: SimpleNamespace, kind: type[Reservations]) -> None:
        self.rng = random.Random(seed)
        self.fake = fake
        self.now_s = 0.0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.order = 0
        self.streams = self.returned_early = 0
        self.loss = self.rng.choice([0.0, 0.05, 0.2])
        num_blocks = self.rng.randint(9, 14)
        self.scheduler = Scheduler(
            SchedulerConfig(num_blocks, BLOCK_TOKENS, max_step_tokens=9, max_sequences=3, max_context_tokens=36)
        )
        self.engine = fake.Engine(num_blocks, BLOCK_TOKENS)
        self.reservations = kind(
            self.scheduler.pool,
            self.scheduler.prefix,
            HandoffConfig(max_reservations=4, max_context_tokens=36, lease_s=self.rng.choice([1.0, 3.0, 6.0])),
            "decode",
            self.scheduler.spare_blocks,
        )
        self.producers = [Producer("p0"), Producer("p1")]
        self.jobs: list[Job] = []
        self.by_reservation: dict[str, Job] = {}
        stem = tuple(self.rng.randrange(50) for _ in range(24))
        for number in range(self.rng.randint(2, 5)):
            self.at(self.rng.uniform(0, 6), self.place, self.new_job(f"j{number}", stem), 0)
        if self.rng.random() < 0.5:
            self.at(self.rng.uniform(0, 4), self.admit_locally, self.new_job("local", stem))
        for producer in self.producers:
            if self.rng.random() < 0.5:
                self.at(self.rng.uniform(0, 8), self.crash, producer)
        self.at(0.0, self.tick)

    def new_job(self, name: str, stem: tuple[int, ...]) -> Job:
        shared = self.rng.choice([0, 9, 24])
        prompt = stem[:shared] + tuple(self.rng.randrange(50) for _ in range(self.rng.randint(1, 8)))
        params = SamplingParams(max_tokens=self.rng.randint(2, 9), ignore_eos=True)
        expected, _ = self.fake.answer(prompt, [], params, (), self.scheduler.context_limit)
        deadline_s = self.rng.choice([1e9, self.now_s + self.rng.uniform(2, 12)])
        return Job(name, prompt, params, expected[:1], deadline_s)

    # ---- time and the network ----

    def at(self, delay_s: float, call: Callable[..., None], *arguments: Any) -> None:
        self.order += 1
        heapq.heappush(self.events, (self.now_s + delay_s, self.order, call, arguments))

    @property
    def faulty(self) -> bool:
        return self.now_s < FAULTS_END_S

    def send(self, call: Callable[..., None], *arguments: Any, writer: Writer | None = None) -> None:
        """A message; those of one writer's stream keep their order unless the network is in a bad mood."""
        copies = 1
        if self.faulty and (mood := self.rng.random()) < self.loss:
            copies = 0 if mood < self.loss / 2 else 2
        for _ in range(copies):
            delay_s = self.rng.expovariate(1 / 0.05)
            if self.faulty and self.rng.random() < self.loss / 2:
                delay_s += self.rng.uniform(0, 8)
            elif writer is not None:
                writer.last_delivery_s = max(writer.last_delivery_s, self.now_s + delay_s)
                delay_s = writer.last_delivery_s - self.now_s
            self.at(delay_s, call, *arguments)

    def run(self) -> None:
        while self.events and self.now_s < PATIENCE_S:
            self.now_s, _, call, arguments = heapq.heappop(self.events)
            call(*arguments)
        self.check()
        assert all(job.ended for job in self.jobs), [(job.name, job.ended) for job in self.jobs]
        assert set(self.reservations.counts().values()) == {0}, self.reservations.counts()
        self.fake.assert_empty(self.scheduler)

    def check(self) -> None:
        self.scheduler.check()
        self.reservations.check()
        self.scheduler.pool.check(self.scheduler.references() + self.reservations.references())

    # ---- the consumer ----

    def place(self, job: Job, attempts: int) -> None:
        if not attempts:
            self.jobs.append(job)
        producer = self.rng.choice(self.producers)
        try:
            job.reservation = self.reservations.reserve(
                job.name,
                job.prompt,
                producer_id=producer.name,
                producer_epoch=producer.epoch,
                deadline_s=job.deadline_s,
                now_s=self.now_s,
            )
        except OutOfBlocks:
            if attempts > 5:
                job.ended = "no room"
            else:
                self.at(0.7, self.place, job, attempts + 1)
            return
        assert job.reservation_id not in self.by_reservation, "an id comes twice"
        self.by_reservation[job.reservation_id] = job
        self.send(self.prefill, producer, job)
        if self.rng.random() < 0.25:
            self.at(self.rng.uniform(0, 4), self.abort, job)

    def admit_locally(self, job: Job) -> None:
        self.jobs.append(job)
        job.output, job.deadline_s = [], 1e9
        self.join(job, None)

    def join(self, job: Job, block_table: tuple[int, ...] | None) -> None:
        job.sequence = Sequence(job.name, job.prompt, list(job.output), job.params, job.deadline_s)
        if block_table is None:
            self.scheduler.add(job.sequence, self.now_s)
        else:
            self.scheduler.adopt(job.sequence, block_table, len(job.prompt), self.now_s)

    def abort(self, job: Job) -> None:
        if job.ended is None:
            if job.sequence is None:
                assert self.reservations.fail(job.reservation_id, "aborted", self.now_s)
            elif not self.scheduler.abort(job.name, self.now_s):
                assert job.deadline_s <= self.now_s, "it ran, and could not be aborted"
                return
            job.ended = "aborted"

    def fail(self, job: Job) -> None:
        if job.ended is None:
            job.ended = "failed"
            assert self.reservations.fail(job.reservation_id, "the hand-over failed", self.now_s)

    def begin(self, producer: Producer, stream: int, writer: Writer, replayed: Reservation) -> None:
        job = writer.job
        try:
            self.reservations.begin(
                replayed.reservation_id,
                sequence_id=job.name,
                producer_id=producer.name,
                producer_epoch=writer.epoch,
                block_ids=replayed.block_ids,
                generations=replayed.generations,
                now_s=self.now_s,
            )
        except TicketRefused:
            return
        assert job.ended is None, "a writer was let in after the end"
        assert job.stream is None, "two writers were let in"
        assert replayed is job.reservation
        assert (producer.name, writer.epoch) == (replayed.producer_id, replayed.producer_epoch), (
            "let in with another's ticket"
        )
        job.stream = stream
        self.send(self.accepted, producer, stream)

    def chunk(self, job: Job, stream: int, first: int, count: int) -> None:
        if job.stream != stream:
            return
        assert job.reservation is not None
        try:
            found = self.engine.read(job.reservation.block_ids, first + count)[first:]
            if found != self.fake.kv_of(job.prompt)[first : first + count]:
                raise TransferFailed("the digest differs")
            self.reservations.landed(job.reservation_id, first, count, self.now_s)
            assert job.ended is None, "a late chunk was accepted"
            self.at(self.rng.choice([0.0, 0.0, 0.5]), self.settle, job, first, count)  # what lands may be staged yet
        except TicketRefused:
            pass
        except TransferFailed:
            self.fail(job)

    def settle(self, job: Job, first: int, count: int) -> None:
        self.reservations.settled(job.reservation_id, first, count)
        entry = self.reservations._live.get(job.reservation_id)
        if entry is not None:
            num_tokens = entry.settled_blocks * BLOCK_TOKENS
            published = self.scheduler.prefix.match((*job.prompt[:num_tokens], -1))
            found = self.engine.read(published, len(published) * BLOCK_TOKENS)
            assert found == self.fake.kv_of(job.prompt)[: len(found)], "what did not land became prefix"
            self.scheduler.pool.release(published)

    def final(self, job: Job, stream: int) -> None:
        if job.stream != stream:
            return
        try:
            block_table = self.reservations.complete(job.reservation_id, self.now_s)
        except TicketRefused:
            return
        except TransferFailed:
            self.fail(job)
            return
        assert job.ended is None, "admitted after it had failed"
        assert self.engine.read(block_table, len(job.prompt)) == self.fake.kv_of(job.prompt), (
            "admitted what did not land"
        )
        self.join(job, block_table)

    def quiet(self, job: Job, stream: int) -> None:
        if job.stream == stream and self.reservations.quiet(job.reservation_id, self.now_s) and job.ended is None:
            job.ended = "writer gave up"

    def tick(self) -> None:
        """The engine loop and the sweeps."""
        for reservation_id in self.reservations.expire(self.now_s):
            assert self.by_reservation[reservation_id].ended is None, "expired after its end"
            self.by_reservation[reservation_id].ended = "expired"
        for job in self.by_reservation.values():
            entry = self.reservations._live.get(job.reservation_id)
            stage = None if entry is None else entry.stage
            assert (job.ended is None and job.sequence is None) or stage in (None, ReservationStage.CANCELLING)
            if stage is ReservationStage.CANCELLING:
                assert entry is not None
                self.returned_early += entry.returned_blocks
                name = job.reservation.producer_id if job.reservation else ""
                self.send(self.cancel, next(p for p in self.producers if p.name == name), job)
        events = self.scheduler.expire(self.now_s)
        if (plan := self.scheduler.plan(self.now_s)) is not None:
            result = self.engine.execute(plan)
            for job in self.jobs:
                if job.sequence is not None and job.ended is None and self.faulty and self.rng.random() < 0.02:
                    self.abort(job)
            events += self.scheduler.commit(plan, result, self.now_s)
        for event in events:
            job = next(job for job in self.jobs if job.name == event.sequence_id)
            if isinstance(event, Failed):
                job.ended = "deadline"
            elif isinstance(event, Tokens) and event.finish is not None:
                assert job.sequence is not None
                expected, _ = self.fake.answer(job.prompt, [], job.params, (), self.scheduler.context_limit)
                assert job.sequence.output_token_ids == expected
                job.ended = "finished"
        self.check()
        if self.faulty or not all(job.ended for job in self.jobs) or self.scheduler.pool.num_held:
            self.at(0.3, self.tick)

    # ---- the producers ----

    def prefill(self, producer: Producer, job: Job) -> None:
        if not producer.up or job.reservation is None:
            return
        self.streams += 1
        writer = producer.writers[self.streams] = Writer(job, producer.epoch)
        self.send(self.begin, producer, self.streams, writer, job.reservation, writer=writer)
        self.at(self.rng.uniform(1, 4), self.give_up, producer, self.streams)

    def accepted(self, producer: Producer, stream: int) -> None:
        writer = producer.writers.get(stream)
        if writer is not None and not writer.stopped and writer.posted_tokens == 0:
            assert writer.job.reservation is not None
            writer.posted_tokens = writer.job.reservation.held_tokens
            self.post(producer, stream)

    def post(self, producer: Producer, stream: int) -> None:
        """The next chunk leaves; it lands some time later, whatever happens meanwhile."""
        writer = producer.writers.get(stream)
        if writer is None or writer.stopped:
            return
        reservation = writer.job.reservation
        assert reservation is not None
        first = writer.posted_tokens
        count = min(self.rng.choice([4, 8, 40]), reservation.num_tokens - first)
        writer.posted_tokens += count
        writer.in_flight += 1
        slow_s = self.rng.uniform(0, 6) if self.faulty and self.rng.random() < 0.1 else 0.0
        self.at(self.rng.expovariate(1 / 0.1) + slow_s, self.land, producer, stream, writer, first, count)
        if writer.posted_tokens < reservation.num_tokens:
            self.at(self.rng.expovariate(1 / 0.2), self.post, producer, stream)
        elif self.faulty and self.rng.random() < 0.1:  # a hasty one does not wait until all has landed
            self.send(self.final, writer.job, stream, writer=writer)

    def land(self, producer: Producer, stream: int, writer: Writer, first: int, count: int) -> None:
        if writer.in_flight == 0:  # lost with the process
            return
        reservation = writer.job.reservation
        assert reservation is not None
        pool = self.scheduler.pool
        blocks = slice(first // BLOCK_TOKENS, -(-(first + count) // BLOCK_TOKENS))
        for block, generation in zip(reservation.block_ids[blocks], reservation.generations[blocks], strict=True):
            assert pool.references(block) == 1, "a write landed in a block that was given away"
            assert pool.generation(block) == generation, "a write landed in a block that is another's"
        damaged = self.faulty and self.rng.random() < 0.03
        entries = self.fake.kv_of(writer.job.prompt)[first : first + count]
        self.engine.write(reservation.block_ids, first, [-2] * count if damaged else entries)
        writer.in_flight -= 1
        if stream in producer.writers and not writer.stopped:
            self.send(self.chunk, writer.job, stream, first, count, writer=writer)
            if writer.posted_tokens == reservation.num_tokens and writer.in_flight == 0:
                self.send(self.final, writer.job, stream, writer=writer)

    def give_up(self, producer: Producer, stream: int) -> None:
        """Nobody answered Begin: this stream will never write."""
        writer = producer.writers.get(stream)
        if writer is not None and writer.posted_tokens == 0:
            writer.stopped = True
            self.send(self.quiet, writer.job, stream, writer=writer)

    def cancel(self, producer: Producer, job: Job) -> None:
        """The consumer asks this producer's address: stop, and say when you are quiet. No answer while it is down; one
        that has restarted knows nothing of the stream, which proves that its writer is gone."""
        if not producer.up or job.stream is None:
            return
        writer = producer.writers.get(job.stream)
        if writer is not None:
            writer.stopped = True
            if writer.in_flight:
                return
        self.send(self.quiet, job, job.stream)

    def crash(self, producer: Producer) -> None:
        """What was posted lands within 2 s or never; the process comes back after that, under a new epoch."""
        producer.up = False
        for writer in producer.writers.values():
            if self.rng.random() < 0.5:
                writer.in_flight = 0
            writer.stopped = True
        lost = list(producer.writers.values())
        producer.writers = {}
        self.at(2.0, self.restart, producer, lost)

    def restart(self, producer: Producer, lost: list[Writer]) -> None:
        producer.up = True
        producer.epoch += 1
        for writer in lost:
            writer.in_flight = 0
            if writer.job.reservation is not None and self.rng.random() < 0.8:  # it finds an old ticket and tries it
                self.prefill(producer, writer.job)


def simulate(fake: SimpleNamespace, seeds: range, kind: type[Reservations] = Reservations) -> dict[str, int]:
    """How the jobs ended."""
    ends: dict[str, int] = {}
    for seed in seeds:
        world = World(seed, fake, kind)
        try:
            world.run()
        except (AssertionError, LegatoError) as error:
            raise AssertionError(f"seed {seed} at {world.now_s:.2f} s: {error}") from error
        for job in world.jobs:
            ends[str(job.ended)] = ends.get(str(job.ended), 0) + 1
        for reason, count in world.reservations.refused.items():
            ends[f"refused: {reason}"] = ends.get(f"refused: {reason}", 0) + count
        preemptions = world.scheduler.totals()["preemptions"]
        ends["preemptions"] = ends.get("preemptions", 0) + preemptions
        ends["returned early"] = ends.get("returned early", 0) + world.returned_early
    return ends


def test_two_thousand_schedules_with_faults(fake: SimpleNamespace) -> None:
    ends = simulate(fake, range(2000))
    for end in (
        "finished",
        "failed",
        "expired",
        "aborted",
        "writer gave up",
        "deadline",
        "no room",
        "preemptions",
        "returned early",
    ):
        assert ends.get(end, 0) >= 20, (end, ends)
    for reason in ("ended", "begun before", "other epoch", "cancelled", "repeated chunk", "gap"):
        assert ends.get(f"refused: {reason}", 0) >= 20, (reason, ends)
    assert ends["finished"] > 2000, ends


def test_a_seed_replays_exactly(fake: SimpleNamespace) -> None:
    assert simulate(fake, range(40, 60)) == simulate(fake, range(40, 60))


class FreesOnFailure(Reservations):
    def fail(self, reservation_id: str, reason: str, now_s: float) -> bool:
        failed = super().fail(reservation_id, reason, now_s)
        if failed and reservation_id in self._live:
            self.quiet(reservation_id, now_s)
        return failed


class ChecksNoTicket(Reservations):
    def begin(self, reservation_id: str, **ticket: Any) -> None:
        reservation = self._find(reservation_id).reservation
        names = ("sequence_id", "producer_id", "producer_epoch", "block_ids", "generations")
        super().begin(reservation_id, **{**ticket, **{name: getattr(reservation, name) for name in names}})


class LetsTwoWritersIn(Reservations):
    def begin(self, reservation_id: str, **ticket: Any) -> None:
        entry = self._find(reservation_id)
        entry.stage = ReservationStage.RESERVED
        super().begin(reservation_id, **ticket)


class NeverExpires(Reservations):
    def expire(self, now_s: float) -> list[str]:
        return []


class AcceptsLateMessages(Reservations):
    def _writing(self, reservation_id: str, now_s: float) -> Any:
        entry = self._find(reservation_id)
        if entry.stage is ReservationStage.CANCELLING:
            entry.stage = ReservationStage.WRITING
        return entry


class AdmitsWhatDidNotLand(Reservations):
    def complete(self, reservation_id: str, now_s: float) -> tuple[int, ...]:
        entry = self._writing(reservation_id, now_s)
        entry.landed_tokens = entry.reservation.num_tokens
        return super().complete(reservation_id, now_s)


class SettlesTooMuch(Reservations):
    def settled(self, reservation_id: str, first_token: int, num_tokens: int) -> None:
        """Also the block of which only the first tokens have landed."""
        entry = self._live.get(reservation_id)
        if entry is not None:
            landed, num_tokens = entry.landed_tokens, num_tokens + BLOCK_TOKENS
            num_tokens = min(num_tokens, entry.reservation.num_tokens - first_token)
            entry.landed_tokens = max(landed, first_token + num_tokens)
            super().settled(reservation_id, first_token, num_tokens)
            entry.landed_tokens = landed


class ForgetsToFree(Reservations):
    def _free(self, entry: Any, how_it_ended: str) -> None:
        self._bury(entry, ReservationStage.FREED, how_it_ended)


class ExpiryFreesWriters(Reservations):
    def expire(self, now_s: float) -> list[str]:
        over = super().expire(now_s)
        for reservation_id in over:
            self.quiet(reservation_id, now_s)
        return over


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (FreesOnFailure, "given away|another's"),
        (ChecksNoTicket, "another's ticket"),
        (LetsTwoWritersIn, "two writers|let in after|after its end"),
        (NeverExpires, "None|reservations_"),
        (AcceptsLateMessages, "late chunk|after it had failed"),
        (AdmitsWhatDidNotLand, "did not land"),
        (SettlesTooMuch, "given away|another's|became prefix"),
        (ForgetsToFree, "seed"),
        (ExpiryFreesWriters, "given away|another's"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_planted_fault_is_found(fake: SimpleNamespace, kind: type[Reservations], found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        simulate(fake, range(400), kind)


def test_the_simulation_knows_every_stage() -> None:
    assert set(ReservationStage) - ENDED == {
        ReservationStage.RESERVED,
        ReservationStage.WRITING,
        ReservationStage.CANCELLING,
    }
