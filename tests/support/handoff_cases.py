"""Random hand-overs between any two workers: tp, pp, dp, replicated heads, latents, block sizes, lengths, prefixes."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import NamedTuple

from memory_worker import MemoryWorker, make_worker

from spec.dtype import Dtype
from spec.layout import KVLayout


class Side(NamedTuple):
    worker: MemoryWorker
    group: int
    blocks: list[int]  # of the sequence, from token 0 on
    num_blocks: int  # in each rank's memory


class Case(NamedTuple):
    whole: KVLayout  # of the model at the source; its block size is nobody's
    source: Side
    target: Side
    first_token: int  # what is before it is there already
    num_tokens: int


def draw_case(seed: int, *, converting: bool = False) -> Case:
    """`converting`: the target keeps its KV in another dtype."""
    draw = random.Random(seed)
    heads, planes = draw.choice([(1, 1), (1, 2), (2, 2), (3, 2), (4, 2), (6, 2)])  # one plane: latents
    whole = KVLayout(draw.randint(1, 5), heads, draw.choice([1, 2, 3]), 1, draw.choice(list(Dtype)), planes)
    first = draw.choice([0, 0, draw.randint(1, 24)])
    count = draw.randint(1, 24) if draw.random() < 0.95 else draw.randint(25, 120)
    theirs = whole
    if converting:
        theirs = dataclasses.replace(whole, dtype=draw.choice([dtype for dtype in Dtype if dtype is not whole.dtype]))
    sides = [_draw_side(draw, each, first + count) for each in (whole, theirs)]
    return Case(whole, *sides, first, count)


def _draw_side(draw: random.Random, whole: KVLayout, num_tokens: int) -> Side:
    layout = dataclasses.replace(whole, block_tokens=draw.choice([1, 2, 3, 4, 5, 8, 16]))
    tp = draw.choice([tp for tp in range(1, 9) if tp <= layout.num_kv_heads or tp % layout.num_kv_heads == 0])
    cuts = sorted(draw.sample(range(1, whole.num_layers), draw.randint(0, min(2, whole.num_layers - 1))))
    bounds = [0, *cuts, whole.num_layers]
    dp, needed = draw.choice([1, 1, 2]), layout.blocks_for(num_tokens)
    num_blocks = needed + draw.randint(0, 2)
    worker = make_worker(
        layout,
        tp=tp,
        layers=[range(start, stop) for start, stop in itertools.pairwise(bounds)],
        dp=dp,
        num_blocks=num_blocks,
        seed=draw.randrange(1 << 30),
    )
    blocks = list(range(needed)) if draw.random() < 0.4 else draw.sample(range(num_blocks), needed)
    return Side(worker, draw.randrange(dp), blocks, num_blocks)
