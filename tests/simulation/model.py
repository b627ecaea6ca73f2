"""A model whose KV says of which prefix it is, and an engine that looks at all of it at every step.

entry(position) = a hash of all tokens up to it; a row of KV is the entry, xor a salt of (layer, plane, head).
token(position) = a hash of the entry before it and the request's seed.

So what a request's answer must be, and what every row that is read must hold, is known beforehand.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray

from kvtransfer.plan import RankKV
from legato.v1 import common_pb2, worker_pb2
from scheduler.plan import Drawn, Slice, StepPlan, StepResult
from service.messages import adapter_id
from spec.dtype import Dtype
from spec.layout import KVLayout
from worker.core import CoreRank

Words = NDArray[numpy.uint64]

VOCAB = 40
EOS = 0
LAYERS, PLANES, HEADS = 2, 2, 2
ADAPTER = common_pb2.Adapter(name="accent", revision="r1")
IDENTITY = worker_pb2.ModelIdentity(model_id="simulated", revision="r1", compute_dtype="float32")
ADAPTER_ID = adapter_id(ADAPTER.name, ADAPTER.revision)
_MASK = (1 << 64) - 1
_POSITIONS = numpy.arange(256)
_SALTS: Words = numpy.random.default_rng(0).integers(1, 1 << 63, (LAYERS, PLANES, HEADS), dtype=numpy.uint64)


def _mix(state: int, value: int) -> int:
    state = (state ^ (value + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 & _MASK
    return (state ^ (state >> 29)) * 0x94D049BB133111EB & _MASK


@dataclasses.dataclass(frozen=True, slots=True)
class Truth:
    """Of one request: prompt and whole answer, and the rows of KV of each of these tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    rows: Words  # [tokens, layers, planes, heads]
    adapter_id: str

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


def truth_of(prompt: tuple[int, ...], seed: int, max_tokens: int, adapter: str = "") -> Truth:
    state, entries = 1 + len(adapter), []
    for token_id in prompt:
        state = _mix(state, token_id)
        entries.append(state)
    answer: list[int] = []
    while len(answer) < max_tokens:
        answer.append(_mix(state, seed + (1 << 32)) % VOCAB)
        state = _mix(state, answer[-1])
        entries.append(state)
        if answer[-1] == EOS:
            break
    words = numpy.array(entries, dtype=numpy.uint64)
    return Truth(prompt, tuple(answer), words[:, None, None, None] ^ _SALTS, adapter and ADAPTER_ID)


def layout_of(block_tokens: int, layers: int = LAYERS, heads: int = HEADS) -> KVLayout:
    return KVLayout(layers, heads, 2, block_tokens, Dtype.FLOAT32, PLANES)


def rectangles(cut: str) -> list[tuple[range, range]]:
    """Layers and heads of each rank."""
    if cut == "tp2":
        return [(range(LAYERS), range(1)), (range(LAYERS), range(1, HEADS))]
    if cut == "pp2":
        return [(range(1), range(HEADS)), (range(1, LAYERS), range(HEADS))]
    return [(range(LAYERS), range(HEADS))]


class Memory:
    """The KV memory of all ranks of one worker, in one buffer. Each of `groups` has `num_blocks` of its own."""

    def __init__(self, num_blocks: int, block_tokens: int, cut: str, groups: int) -> None:
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        held = [(group, *rectangle) for group in range(groups) for rectangle in rectangles(cut)]
        layouts = [layout_of(block_tokens, len(layers), len(heads)) for _, layers, heads in held]
        sizes = [num_blocks * layout.block_bytes for layout in layouts]
        self.buffer = memoryview(bytearray(sum(sizes)))
        self.ranks: list[CoreRank] = []
        self.offsets: list[int] = []
        # Of each group's ranks, [num_blocks, layers, planes, heads, slots], and which layers and heads.
        self._views: list[list[tuple[Words, slice, slice]]] = [[] for _ in range(groups)]
        offset = 0
        for number, ((group, layers, heads), layout, size) in enumerate(zip(held, layouts, sizes, strict=True)):
            own = self.buffer[offset : offset + size]
            landing = torch.frombuffer(own, dtype=torch.float32).view(layout.shape(num_blocks))
            kv = RankKV(layout, layers, heads)
            self.ranks.append(CoreRank(kv, group, offset, landing=landing, number=number))
            self.offsets.append(offset)
            view = numpy.frombuffer(own, dtype=numpy.uint64).reshape(layout.shape(num_blocks)[:-1])
            self._views[group].append((view, slice(layers.start, layers.stop), slice(heads.start, heads.stop)))
            offset += size

    def block_of(self, offset_bytes: int) -> tuple[int, int]:
        """(Group, the block that holds this byte of the buffer)."""
        rank = self.ranks[bisect.bisect_right(self.offsets, offset_bytes) - 1]
        return rank.group, (offset_bytes - rank.offset_bytes) // rank.kv.layout.block_bytes

    def write(self, group: int, table: Sequence[int], first: int, rows: Words) -> None:
        """`rows` [tokens, layers, planes, heads], of the tokens from `first` on."""
        blocks, slots = self._places(table, first, len(rows))
        for view, layers, heads in self._views[group]:
            view[blocks, :, :, :, slots] = rows[:, layers, :, heads]

    def holds(self, group: int, table: Sequence[int], first: int, rows: Words) -> bool:
        """Whether these are the rows of the tokens from `first` on, in every layer and head."""
        blocks, slots = self._places(table, first, len(rows))
        return all(
            numpy.array_equal(view[blocks, :, :, :, slots], rows[:, layers, :, heads])
            for view, layers, heads in self._views[group]
        )

    def _places(self, table: Sequence[int], first: int, count: int) -> tuple[NDArray[numpy.int64], ...]:
        positions = _POSITIONS[first : first + count]
        return numpy.array(table)[positions // self.block_tokens], positions % self.block_tokens


class WrongKV(AssertionError):
    """A sequence read what is not the KV of its prefix."""


class Engine:
    """Carries out a step: what is read must be right, what is written is, now and once more when the step ends: a block
    that was given away in between is spoilt, and its new owner's engine sees it."""

    def __init__(self, memory: Memory, truths: dict[str, Truth]) -> None:
        """`truths`: by request."""
        self._memory = memory
        self._truths = truths

    def truth(self, sequence_id: str) -> Truth:
        return self._truths[sequence_id.partition("-")[0]]

    def execute(self, group: int, plan: StepPlan) -> StepResult:
        drawn: list[tuple[Drawn, ...]] = []
        for piece in plan.slices:
            truth = self.truth(piece.sequence_id)
            end = piece.start + len(piece.token_ids)
            if piece.adapter != truth.adapter_id:
                raise WrongKV(f"{piece.sequence_id} computes with adapter {piece.adapter!r}")
            if piece.token_ids != truth.tokens[piece.start : end]:
                raise WrongKV(f"{piece.sequence_id} computes other tokens than its own from {piece.start} on")
            if piece.start and not self._memory.holds(group, piece.block_table, 0, truth.rows[: piece.start]):
                raise WrongKV(f"{piece.sequence_id} reads KV that is not its own in {piece.block_table}")
            self._write(group, piece, truth)
            drawn.append((Drawn(truth.tokens[end]),) if piece.draw is not None else ())
        return StepResult(tuple(drawn), tuple(() for _ in plan.slices))

    def finish(self, group: int, plan: StepPlan) -> None:
        for piece in plan.slices:
            self._write(group, piece, self.truth(piece.sequence_id))

    def _write(self, group: int, piece: Slice, truth: Truth) -> None:
        end = piece.start + len(piece.token_ids)
        self._memory.write(group, piece.block_table, piece.start, truth.rows[piece.start : end])
