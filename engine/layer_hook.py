"""Whoever sends KV away hears while a step is executed which layers have written theirs."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import NamedTuple

import torch


class LayerHook(NamedTuple):
    """`written(end)` is called for each of `ends`, in order: in all layers of the rank before `end` the KV of the
    step's tokens is in the blocks.

    On the CPU it is called by the thread that executes the step, and an exception of it ends the step; the KV of the
    slices is then undefined. On a GPU it is called by a thread of its own, perhaps after the step's result is there,
    and must raise nothing."""

    ends: tuple[int, ...]  # rising; the last is at most the rank's number of layers
    written: Callable[[int], None]


class DeviceHooks:
    """Of one GPU: what is queued on the stream is written when the event behind it has come."""

    def __init__(self) -> None:
        self._waiting = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="layers")

    def following(self, hook: LayerHook) -> LayerHook:
        """Called by the thread that queues kernels, on its current stream."""

        def queued(end: int) -> None:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            self._waiting.submit(_wait, event, hook.written, end)

        return hook._replace(written=queued)


def _wait(event: torch.cuda.Event, written: Callable[[int], None], end: int) -> None:
    event.synchronize()
    written(end)
