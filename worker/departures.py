"""Chunks of one hand-over on their way out, layer group by layer group.

    begin()     a step will compute it          its blocks are held from here on
    reached()   layers are in the blocks        they leave: staged, posted, digested as they are copied or beside it
    computed()  the step is committed           all of it may leave, and it may be told
                all landed                      told, and its blocks are given back
    end()       none follows

What leaves before the step has ended is told to nobody as KV: a step that fails leaves bytes in reserved blocks, which
the decode worker does not admit. Chunks leave and are told in order; the next one leaves while the last one lands.

A transfer that failed or outran its clock may still read its blocks here, which are given back all the same. No Chunk
of it was told or ever will be, so what it reads lands in blocks that their owner has out of use until no write can land
there any more; those bytes may be anything. What is not given back before that is known is the owner's memory alone.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from kvtransfer.digest import DigestPolicy, SentDigests, counting
from kvtransfer.grids import TransferPlan
from kvtransfer.plan import common
from kvtransfer.routes import HandoffPlan, RankMemory
from kvtransfer.transport import Peer, Region, Transfer
from kvtransfer.writes import address_of
from legato.v1 import worker_pb2
from legato.v1.common_pb2 import TransferStats
from service import logs
from spec.errors import LegatoError, TransferFailed
from worker.link import HANDOFF_BYTES, Link
from worker.staging import Staging

logger = logs.get(__name__)

_Planned = TypeVar("_Planned")

# What is digested leaves in shipments of at least so much: while the receiver digests one the next one moves, and the
# link has room for the one behind it. Each is planned, posted and told of, which takes 0.2 to 0.5 ms on either side.
SHIPMENT_BYTES = HANDOFF_BYTES // 2
RANKS_PLANNED_AT_ONCE = 2  # of the target; a rank takes some 0.05 ms

TRANSFER_TIMEOUT_S = 10.0  # the moving clock of one group of layers; the waiting clock is the reservation's lease


class Way(NamedTuple):
    """To one host of the target."""

    host: int
    peer: Peer
    link: Link  # to the peer, shared with other hand-overs to it


class Target(NamedTuple):
    """Where one reservation's blocks are."""

    ticket: worker_pb2.Ticket
    signed: worker_pb2.SignedTicket
    ranks: tuple[RankMemory, ...]
    ways: tuple[Way, ...]  # to each host that ranks are on
    transport: str
    lease_s: float


class _Chunk:
    """Of tokens up to `end`, which are computed by one step. Its blocks are held until `release()`."""

    def __init__(self, end: int, group: int, block_table: tuple[int, ...], release: Callable[[], None]) -> None:
        self.end, self.group, self.block_table, self.release = end, group, block_table, release
        self.first = self.num_tokens = 0  # what is sent of it: whole blocks, and what the last one held back
        self.layers = 0  # [0, layers) are in the blocks
        self.is_computed = False
        self.has_left = False  # some of it
        self.digests: SentDigests | None = None  # None: not digested
        self.plan: HandoffPlan | None = None  # None: nothing of it has been staged


class _Shipment(NamedTuple):
    """Some layers of a chunk, those of them that ranks on one host hold, behind what was posted before."""

    chunk: _Chunk
    way: Way
    transfer: Transfer
    digesting: list[asyncio.Future[None]]  # beside it
    end_layer: int  # before which all is there once it has landed; 0: others follow for that
    nbytes: int
    posted_s: float


class _Done(NamedTuple):
    """All that leaves of a chunk has been posted, or nothing more leaves."""

    chunk: _Chunk


class Departures:
    """Owned by one Sender; every method runs in the event loop. `tell` sends on the hand-over's stream, `fail` ends it;
    once `failed` is set nothing more leaves, and run() ends when what did has landed or is known not to."""

    def __init__(
        self,
        target: Target,
        staging: Staging,
        policy: DigestPolicy,
        pool: concurrent.futures.Executor,
        tell: Callable[[worker_pb2.HandoffRequest], Awaitable[None]],
        failed: asyncio.Future[LegatoError],
    ) -> None:
        self.stats = TransferStats(transport=target.transport, skipped_tokens=target.ticket.first_token)
        self.first_write_ns = 0
        self.unproven: set[Way] = set()  # where a transfer failed or outran its clock: some of it may still land
        self._target, self._staging, self._policy = target, staging, policy
        self._pool, self._tell, self._failed = pool, tell, failed
        self._name = target.ticket.reservation_id
        self._num_layers = max(rank.kv.layers.stop for rank in target.ranks)
        self._first_token = target.ticket.first_token  # of what no chunk before has taken
        self._open: dict[int, _Chunk] = {}  # begun and not computed, by their end
        self._chunks: asyncio.Queue[_Chunk | None] = asyncio.Queue()
        self._posted: asyncio.Queue[_Shipment | _Done | None] = asyncio.Queue()
        self._unsettled = 0  # chunks that have begun to leave and are not told
        self._ended = False
        self._changed = asyncio.Event()
        self._landed_s = 0.0  # of the last shipment
        failed.add_done_callback(lambda _: self._changed.set())

    # ---- what the engine's steps tell --------------------------------------------------------------------------------

    def begin(self, end: int, group: int, block_table: tuple[int, ...], release: Callable[[], None]) -> None:
        """A step that computes the tokens before `end`, up to which the others are there, is submitted."""
        chunk = _Chunk(end, group, block_table, release)
        if self._ended:
            release()
            return
        self._open[end] = chunk
        self._chunks.put_nowait(chunk)

    def reached(self, end: int, layers: int) -> None:
        """Of the chunk that ends at token `end`; of one that is not open nothing is to be known any more."""
        if (chunk := self._open.get(end)) is not None:
            chunk.layers = max(chunk.layers, layers)
            self._changed.set()

    def computed(self, end: int) -> None:
        self.reached(end, self._num_layers)
        if (chunk := self._open.pop(end, None)) is not None:
            chunk.is_computed = True

    def end(self) -> None:
        """No chunk begins any more."""
        if not self._ended:
            self._ended = True
            self._chunks.put_nowait(None)

    # ---- on their way ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until end() and all chunks before it are settled."""
        settling = asyncio.create_task(self._settle_all())
        while (chunk := await self._chunks.get()) is not None:
            self._unsettled += 1
            await self._guarded(self._send(chunk))
            if self._failed.done() and not chunk.has_left:
                self._settled(chunk)  # those before it may take long, and read nothing of it
            else:
                self._posted.put_nowait(_Done(chunk))
        self._posted.put_nowait(None)
        await settling
        for way in self._target.ways:
            way.link.leave(self._name)

    async def _guarded(self, step: Awaitable[None]) -> None:
        """What fails ends the hand-over."""
        try:
            await step
        except LegatoError as error:
            self._fail(error)
        except Exception as error:
            logger.exception("sending a chunk failed")
            self._fail(TransferFailed(f"sending a chunk failed: {error}"))

    def _fail(self, error: LegatoError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)

    async def _until(self, holds: Callable[[], bool]) -> bool:
        """False: the hand-over failed before it held."""
        while not (self._failed.done() or holds()):
            self._changed.clear()
            await self._changed.wait()
        return not self._failed.done()

    async def _send(self, chunk: _Chunk) -> None:
        ticket, first, end = self._target.ticket, self._first_token, chunk.end
        if end < ticket.num_tokens:  # a block leaves once it is full; the last one as it is
            end -= end % self._staging.block_tokens(chunk.group)
        if end <= first:
            return
        chunk.first, chunk.num_tokens, self._first_token = first, end - first, end
        if self._staging.converts(chunk.group) and not await self._until(lambda: self._unsettled == 1):
            return  # what the chunk before is sent from is written anew
        departed = 0
        while departed < self._num_layers and await self._until(lambda: chunk.layers > departed):  # noqa: B023
            if not departed and self._policy.covers(ticket.reservation_id, first):
                chunk.digests = SentDigests(self._staging.routes(chunk.group))
            layers = range(departed, chunk.layers)
            if chunk.digests is not None:
                layers = layers[: self._together(layers, chunk.num_tokens)]
            await self._post(chunk, layers)
            departed = layers.stop

    async def _post(self, chunk: _Chunk, layers: range) -> None:
        target, first, count = self._target, chunk.first, chunk.num_tokens
        staged = await self._staging.stage(chunk.group, chunk.block_table, first, first + count, layers)
        if chunk.plan is None:  # of every layer what is staged lies at the same places
            blocks, sums = target.ticket.block_ids, None if chunk.digests is None else chunk.digests.sums
            given = staged.ranks, staged.block_table, target.ranks, blocks, first, count, sums
            chunk.plan = await self._planned(lambda: HandoffPlan(*given))
        plan = chunk.plan
        held = {way: sum(_layer_bytes(rank, layers) for rank in self._ranks_at(way)) for way in target.ways}
        ways = [way for way, token_bytes in held.items() if token_bytes]
        for way in ways:
            pieces = await self._planned(functools.partial(plan.of, layers, way.host))
            if not await self._may_write(way.link, count * held[way]):
                return
            end_layer = layers.stop if way is ways[-1] else 0
            self._post_pieces(chunk, way, staged.region, pieces, count * held[way], end_layer)

    def _post_pieces(
        self, chunk: _Chunk, way: Way, source: Region, pieces: TransferPlan, nbytes: int, end_layer: int
    ) -> None:
        """The link has granted `nbytes`."""
        self.first_write_ns = self.first_write_ns or time.time_ns()
        try:
            chunk.has_left = True
            transfer = way.peer.post(source, pieces)
        except BaseException:
            way.link.landed(self._name, nbytes)
            raise
        posted_s, digesting = time.monotonic(), []
        if chunk.digests is not None and not way.peer.digests_rows:
            event_loop, calls = asyncio.get_running_loop(), counting(pieces, address_of(source.buffer)[0])
            digesting = [event_loop.run_in_executor(self._pool, call) for call in calls]
        self._posted.put_nowait(_Shipment(chunk, way, transfer, digesting, end_layer, nbytes, posted_s))
        self.stats.pieces += len(pieces)

    def _ranks_at(self, way: Way) -> list[RankMemory]:
        return [rank for rank in self._target.ranks if rank.host == way.host]

    async def _planned(self, planning: Callable[[], _Planned]) -> _Planned:
        """Beside the event loop where it takes longer than a thread takes to begin: it is paid rank by rank."""
        if len(self._target.ranks) <= RANKS_PLANNED_AT_ONCE:
            return planning()
        return await asyncio.get_running_loop().run_in_executor(self._pool, planning)

    def _together(self, layers: range, num_tokens: int) -> int:
        """How many of `layers`, ready to leave, make the next of equal shipments."""
        nbytes = num_tokens * sum(_layer_bytes(rank, layers) for rank in self._target.ranks)
        return -(-len(layers) // max(1, min(len(layers), nbytes // SHIPMENT_BYTES)))

    async def _may_write(self, link: Link, nbytes: int) -> bool:
        """Once the link has room. False: the hand-over failed before."""
        slack_s = self._target.ticket.expires_unix_ns / 1e9 - time.time()
        granted = link.ask(self._name, nbytes, slack_s)
        either: list[asyncio.Future[Any]] = [granted, self._failed]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if granted.done():
            return True
        link.withdraw(self._name)
        return False

    async def _settle_all(self) -> None:
        """In the order in which they were posted. Blocks are given back when nothing of their chunk is in flight."""
        while (posted := await self._posted.get()) is not None:
            if isinstance(posted, _Shipment):
                await self._guarded(self._settle(posted))
                continue
            await self._guarded(self._finish(posted.chunk))
            self._settled(posted.chunk)

    def _settled(self, chunk: _Chunk) -> None:
        chunk.release()
        self._unsettled -= 1
        self._changed.set()

    async def _settle(self, shipment: _Shipment) -> None:
        began_s = max(shipment.posted_s, self._landed_s)  # those that were posted before it have the link first
        try:
            async with asyncio.timeout(began_s + TRANSFER_TIMEOUT_S - time.monotonic()):
                await asyncio.wrap_future(shipment.transfer)  # it cannot be cancelled: it runs already
        except TimeoutError:
            self.unproven.add(shipment.way)
            raise TransferFailed(f"a chunk did not land in {TRANSFER_TIMEOUT_S} s") from None
        except TransferFailed:
            self.unproven.add(shipment.way)
            raise
        finally:
            shipment.way.link.landed(self._name, shipment.nbytes)
            await asyncio.gather(*shipment.digesting)
        now_s = time.monotonic()
        self.stats.moving_s += now_s - began_s
        self._landed_s = now_s
        chunk = shipment.chunk
        is_early = 0 < shipment.end_layer < self._num_layers
        if chunk.digests is not None and is_early and not self._failed.done():
            landed = worker_pb2.HandoffRequest.Landed(
                first_token=chunk.first, num_tokens=chunk.num_tokens, end_layer=shipment.end_layer
            )
            await self._tell(worker_pb2.HandoffRequest(landed=landed))

    async def _finish(self, chunk: _Chunk) -> None:
        if not await self._until(lambda: chunk.is_computed) or not chunk.num_tokens:
            return
        self.stats.bytes += sum(rank.kv.layout.token_bytes for rank in self._target.ranks) * chunk.num_tokens
        self.stats.sent_tokens += chunk.num_tokens
        digests = [] if chunk.digests is None else chunk.digests.digests()
        told = worker_pb2.HandoffRequest.Chunk(first_token=chunk.first, num_tokens=chunk.num_tokens, digests=digests)
        await self._tell(worker_pb2.HandoffRequest(chunk=told))


def _layer_bytes(rank: RankMemory, layers: range) -> int:
    """Of one token, in those of `layers` that the rank holds."""
    layout = rank.kv.layout
    return layout.token_bytes // layout.num_layers * len(common(layers, rank.kv.layers))
