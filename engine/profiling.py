"""What a rank takes of its device beside KV: its weights, and the step that takes the most memory."""

from __future__ import annotations

import dataclasses

import torch

from engine.engine import Engine
from scheduler.plan import Draw, Slice, StepPlan
from spec.sampling import SamplingParams


def largest_step(
    max_step_tokens: int, max_sequences: int, max_context_tokens: int, block_tokens: int, num_blocks: int
) -> StepPlan:
    """As many sequences and tokens as a step may have, each sequence as long as one may be and drawing by chance: one
    prompt as long as fits, and decodes beside it. All of them share `num_blocks` blocks, in turn."""
    num_sequences = min(max_sequences, max_step_tokens)
    remaining = max_step_tokens - num_sequences
    table = tuple(index % num_blocks for index in range(-(-max_context_tokens // block_tokens)))
    params, slices = SamplingParams(temperature=1.0, seed=0), []
    for row in range(num_sequences):
        count = 1 + min(remaining, max_context_tokens - 1)
        remaining -= count - 1
        draw = Draw(params, max_context_tokens, max_context_tokens, ())
        slices.append(Slice(f"largest/{row}", (0,) * count, max_context_tokens - count, table, draw))
    return StepPlan(0, tuple(slices))


def run_largest_step(engine: Engine, max_step_tokens: int, max_sequences: int) -> None:
    """Called on every rank at once. Writes into all of the KV memory: before any sequence holds a block of it."""
    kv = engine.kv
    kv.tensor.view(torch.uint8).zero_()
    context_tokens, block_tokens = engine.spec.max_context_tokens, kv.layout.block_tokens
    engine.execute(largest_step(max_step_tokens, max_sequences, context_tokens, block_tokens, kv.num_blocks))


def weight_bytes(weights: object) -> int:
    """Of all tensors in it, which may lie in dataclasses, tuples, lists and dicts; what is there twice counts once."""
    found: dict[int, int] = {}
    left = [weights]
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif dataclasses.is_dataclass(each):
            left.extend(getattr(each, field.name) for field in dataclasses.fields(each))
        elif isinstance(each, dict):
            left.extend(each.values())
        elif isinstance(each, tuple | list):
            left.extend(each)
    return sum(found.values())
