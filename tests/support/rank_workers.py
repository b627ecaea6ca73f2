"""Workers of several ranks within one process: real services, scheduler, transports and memories, a toy for the model.

The toy's KV entry of a token depends on every byte of every entry before it, on all ranks, read through the block
table; and the next token does. So an answer is right only if every (layer, head) of every token is right on every rank.
`answer()` computes the same from the tokens alone, without ranks and blocks.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy
import torch
from memory_worker import Bytes, MemoryWorker, loaded, make_worker, slots, stored

from engine.engine import Engine
from engine.grammar import Grammars, Matcher
from engine.kv_memory import TORCH_DTYPES
from kvtransfer.memory import MemoryTransport
from kvtransfer.routes import RankMemory, ranks_to_proto
from legato.v1 import worker_pb2
from scheduler.batch import Scheduler, SchedulerConfig
from scheduler.handoff import HandoffConfig
from scheduler.plan import Drawn, Slice, StepPlan, StepResult
from service.config import WorkerConfig
from service.messages import layout_to_proto
from service.wire import spoken
from spec.constraint import Constraint
from spec.dtype import Dtype
from spec.errors import InvalidParameter
from spec.layout import KVLayout
from telemetry.setup import Telemetry
from worker.core import Core, CoreRank
from worker.executor import StepExecutor
from worker.lanes import LaneReservations, Lanes
from worker.meter import Meter

VOCAB = 431
CONTEXT_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a worker is laid out; `group` (of dp) is the one that serves."""

    whole: KVLayout
    tp: int = 1
    layers: tuple[range, ...] | None = None  # of each pipeline stage
    dp: int = 1
    group: int = 0
    num_blocks: int = 80


def entry(state: bytes, token_id: int, whole: KVLayout) -> Bytes:
    """[layers, planes, heads, row_bytes] of a token behind what `state` stands for."""
    seed = int.from_bytes(hashlib.blake2b(state + token_id.to_bytes(4, "little"), digest_size=8).digest(), "little")
    shape = (whole.num_layers, whole.planes, whole.num_kv_heads, whole.head_dim)
    return stored(numpy.random.default_rng(seed).standard_normal(shape, numpy.float32), whole.dtype)


def state_after(state: bytes, entries: Sequence[Bytes]) -> bytes:
    for rows in entries:
        state = hashlib.blake2b(state + rows.tobytes(), digest_size=16).digest()
    return state


def next_token(state: bytes) -> int:
    return int.from_bytes(state[:8], "little") % VOCAB


def answer(
    prompt: Sequence[int], max_tokens: int, prefill: KVLayout, decode: KVLayout | None = None
) -> tuple[int, ...]:
    """Decode goes on from what it holds of the prompt: the entries that prefill wrote, in its own dtype."""
    decode = decode or prefill
    entries: list[Bytes] = []
    state = b""
    for token_id in prompt:
        entries.append(entry(state, token_id, prefill))
        state = state_after(state, entries[-1:])
    drawn = [next_token(state)]
    if decode.dtype is not prefill.dtype:
        state = state_after(b"", [stored(loaded(rows, prefill.dtype), decode.dtype) for rows in entries])
    while len(drawn) < max_tokens:
        state = state_after(state, [entry(state, drawn[-1], decode)])
        drawn.append(next_token(state))
    return tuple(drawn)


class MemoryCore(Core):
    """Core, but for the engine and the device: it executes steps itself."""

    memory: MemoryWorker
    cut: Cut

    def submit(self, plans: Sequence[StepPlan], watch: Any, meanwhile: Callable[[], None]) -> None:
        meanwhile()
        drawn = [tuple(self._slice(piece, group) for piece in plan.slices) for group, plan in enumerate(plans)]
        self.results = [StepResult(each, ((),) * len(each)) for each in drawn]

    def result(self) -> Sequence[StepResult]:
        return self.results

    def totals(self) -> dict[str, int]:
        return {}

    def _slice(self, piece: Slice, group: int) -> tuple[Drawn, ...]:
        state = state_after(b"", self._read(piece.block_table, piece.start, group))
        places = slots(piece.block_table, self.cut.whole)
        for position, token_id in enumerate(piece.token_ids, piece.start):
            rows = entry(state, token_id, self.cut.whole)
            block, slot = places[position]
            for rank, view in self._views(group):
                view[block, :, :, :, slot] = rows[_slice(rank.kv.layers), :, _slice(rank.kv.heads)]
            state = state_after(state, [rows])
        return () if piece.draw is None else (Drawn(next_token(state)),)

    def _read(self, block_table: Sequence[int], num_tokens: int, group: int) -> list[Bytes]:
        """The entries of tokens [0, num_tokens), out of all ranks; replicas hold the same."""
        whole = self.cut.whole
        rows = numpy.zeros((num_tokens, whole.num_layers, whole.planes, whole.num_kv_heads, whole.row_bytes), "uint8")
        blocks, offsets = numpy.array(slots(block_table, whole)[:num_tokens], dtype=int).reshape(-1, 2).T
        seen: set[tuple[range, range]] = set()
        for rank, view in self._views(group):
            own = rows[:, _slice(rank.kv.layers), :, _slice(rank.kv.heads)]
            held = view[blocks, :, :, :, offsets]
            if (rank.kv.layers, rank.kv.heads) in seen:
                numpy.testing.assert_array_equal(held, own, "replicas differ")
            own[...] = held
            seen.add((rank.kv.layers, rank.kv.heads))
        return list(rows)

    def _views(self, group: int) -> list[tuple[RankMemory, Bytes]]:
        pairs = zip(self.memory.ranks, self.memory.views, strict=True)
        return [(rank, view) for rank, view in pairs if rank.group == group]


class OneOfTheLanes(Lanes):
    """Everything is placed in one."""

    group = 0

    def lightest(self, token_ids: Sequence[int], adapter: str) -> Scheduler:
        return self.schedulers[self.group]


def _slice(indices: range) -> slice:
    return slice(indices.start, indices.stop)


def builder(cuts: dict[str, Cut], model: Path, chunk_tokens: int = 32) -> Callable[..., Core]:
    """In place of worker.serving.build_core: workers of each role, or of an id, are laid out by `cuts`; `model` has the
    tokenizer."""

    def build(config: WorkerConfig, telemetry: Telemetry, report: Callable[[str, float], None], place: None) -> Core:
        cut = cuts.get(config.worker_id or "") or cuts[config.role]
        return _core(config, telemetry, cut, model, chunk_tokens)

    return build


def _core(config: WorkerConfig, telemetry: Telemetry, cut: Cut, model: Path, chunk_tokens: int) -> MemoryCore:
    memory = make_worker(cut.whole, tp=cut.tp, layers=cut.layers, dp=cut.dp, num_blocks=cut.num_blocks, seed=5)
    transport = MemoryTransport()
    region = transport.register(memory.region.nbytes, memoryview(memory.region))
    record = worker_pb2.WorkerRecord(
        worker_id=config.worker_id,
        role=worker_pb2.PREFILL if config.role == "prefill" else worker_pb2.DECODE,
        epoch=1,
        identity=worker_pb2.ModelIdentity(model_id="toy", revision="1", compute_dtype="float32"),
        kv_layout=layout_to_proto(cut.whole),
        ranks=ranks_to_proto(memory.ranks),
        total_blocks=cut.num_blocks * cut.dp,
        max_context_tokens=CONTEXT_TOKENS,
        max_step_tokens=chunk_tokens,
        endpoints=[
            worker_pb2.TransportEndpoint(name=transport.name, address=transport.address, region=region.descriptor)
        ],
        model_path=str(model),
        vocab_size=VOCAB,
        wire=spoken(),
    )
    lanes = OneOfTheLanes.of(
        SchedulerConfig(
            num_blocks=cut.num_blocks,
            block_tokens=cut.whole.block_tokens,
            max_step_tokens=chunk_tokens,
            max_sequences=8,
            max_context_tokens=CONTEXT_TOKENS,
            group=group,
        )
        for group in range(cut.dp)
    )
    lanes.group = cut.group
    reservations = LaneReservations(
        lanes,
        lambda group: HandoffConfig(8, CONTEXT_TOKENS, config.handoff.lease_s, group=group),
        consumer=f"{config.worker_id}/1",
    )
    views = [torch.from_numpy(view).view(TORCH_DTYPES[cut.whole.dtype]) for view in memory.views]
    core = MemoryCore(
        config=config,
        cluster_key=config.cluster_key.get_secret_value().encode(),
        record=record,
        ranks=tuple(
            CoreRank(rank.kv, rank.group, rank.offset_bytes, landing=view)
            for rank, view in zip(memory.ranks, views, strict=True)
        ),
        engine=cast(Engine, SimpleNamespace(groups=SimpleNamespace(close=lambda: None))),
        others=None,
        grammars=Grammars(_no_constraints, range(record.vocab_size), 8),
        executor=cast(StepExecutor, cast(Any, None)),
        landings_are_kv=True,
        transports={transport.name: transport},
        regions={transport.name: region},
        scheduler=lanes,
        reservations=reservations,
        digest_pool=concurrent.futures.ThreadPoolExecutor(2),
        meter=Meter(telemetry),
    )
    core.memory, core.cut = memory, cut
    core.executor = MemorySteps(core)
    return core


class MemorySteps:
    """A MemoryCore as its loop sees it."""

    steps_out = 1

    def __init__(self, core: MemoryCore) -> None:
        self.submit, self.result, self.totals = core.submit, core.result, core.totals

    def prepare(self, slices: Sequence[Slice]) -> None:
        """It reads plans alone."""


def _no_constraints(constraint: Constraint) -> Matcher:
    raise InvalidParameter("is not for a toy", field="constraint")


def toy_layout(
    num_layers: int = 4, heads: int = 2, block_tokens: int = 8, dtype: Dtype = Dtype.FLOAT16, planes: int = 2
) -> KVLayout:
    return KVLayout(num_layers, heads, 6, block_tokens, dtype, planes)
