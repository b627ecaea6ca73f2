"""Which blocks a Prefill call has held for a hand-over."""

from __future__ import annotations

import random
import types
import typing
from typing import Any

import pytest

from legato.v1 import worker_pb2
from prefill_svc.call import PrefillCall

nobody = typing.cast("Any", None)


def call_of(ticket: worker_pb2.Ticket, block_tokens: int) -> PrefillCall:
    record = worker_pb2.WorkerRecord(kv_layout=worker_pb2.KVLayout(block_tokens=block_tokens))
    core = typing.cast("Any", types.SimpleNamespace(record=record))
    call = PrefillCall(worker_pb2.PrefillRequest(), core, nobody, nobody, nobody)
    call._ticket, call._taken_tokens = ticket, ticket.first_token
    return call


@pytest.mark.parametrize("seed", range(20))
async def test_each_chunk_has_what_leaves_with_it_and_no_more(seed: int) -> None:
    """Whatever the steps are, also those of a sequence that is computed again: each token leaves once, with the first
    chunk in whose full block it is."""
    draw = random.Random(seed)
    size, total = draw.choice((1, 3, 4, 16)), draw.randint(1, 123)
    held = draw.choice((0, draw.randrange(total)))
    ends = sorted({total, *(draw.randint(1, total) for _ in range(draw.randint(0, 9)))})
    again = draw.randint(0, len(ends))
    call = call_of(worker_pb2.Ticket(first_token=held, num_tokens=total), size)
    table = tuple(range(1000, 1000 + -(-total // size)))
    sent = held
    for end in [*ends[:again], *ends]:  # preempted after `again` steps
        blocks = call.leaving(table[: -(-end // size)], end)
        full = end if end == total else end // size * size
        leaving = {table[token // size] for token in range(sent, full)}
        assert leaving <= set(blocks)
        assert len(blocks) <= len(leaving) + 1, "but for the block that is not full yet"
        sent = max(sent, full)
    assert sent == total
