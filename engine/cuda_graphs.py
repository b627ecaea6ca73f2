"""Decode steps on a GPU, replayed from CUDA graphs: a step is then one launch, and not hundreds.

A graph has fixed shapes and addresses. So there is one for each of a few numbers of rows, the sizes, and a step takes
the smallest that holds it. Its inputs lie in tensors that stay where they are, and rows that no sequence needs are
padding: token 0 at position 0 of a spare block behind those of the KV memory that sequences own. A padding row reads
and writes there alone, and nothing reads what it gives.

Head and argmax are in the graph. All graphs share one pool of memory: one runs at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder
from engine.inputs import HostInputs
from engine.step import StepTensors
from scheduler.plan import Slice
from spec.layout import KVLayout
from spec.model import ModelSpec
from spec.shard import RankShard

MOST_PADDING = 7  # rows: what lies between two neighbours of sizes_up_to


def can_capture(spec: ModelSpec, shard: RankShard, device: torch.device) -> bool:
    """One rank with dense layers. Experts count on the way which rows they get, and padding would be counted."""
    return device.type == "cuda" and shard.layout.num_ranks == 1 and spec.moe is None


def spare_blocks(layout: KVLayout) -> int:
    """Blocks for the KV of all padding rows of a step."""
    return layout.blocks_for(MOST_PADDING)


def sizes_up_to(most_rows: int) -> tuple[int, ...]:
    """1, 2, 4, 8, and from there in steps of 8, up to the first that holds `most_rows`."""
    sizes = (1, 2, 4, *range(8, most_rows + 8, 8))
    return tuple(size for before, size in zip((0, *sizes), sizes, strict=False) if before < most_rows)


def is_plain_decode(piece: Slice) -> bool:
    """One token of the base model, after which one is drawn."""
    is_decode = len(piece.token_ids) == 1 and piece.draw is not None and piece.num_guesses == 0
    return is_decode and not piece.adapter and piece.prompt_logprobs is None


class DecodeInputs:
    """The tensors that the graphs read. They belong to one device, and a step is written into their first rows.

    The spare blocks are those from `first_spare` on. The host's side is free to be written again when the step that it
    was written for has ended."""

    def __init__(
        self,
        layout: KVLayout,
        first_spare: int,
        most_rows: int,
        max_context_tokens: int,
        device: torch.device,
    ) -> None:
        self.sizes = sizes_up_to(most_rows)
        self._block_tokens, self._first_spare = layout.block_tokens, first_spare
        rows, width = self.sizes[-1], min(layout.blocks_for(max_context_tokens), max(first_spare, 1))
        pinned = device.type == "cuda"
        self._host_rows = torch.zeros(4, rows, dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.zeros(rows * width, dtype=torch.int32, pin_memory=pinned)
        self._rows = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._landed_tables = torch.zeros(rows * width, dtype=torch.int32, device=device)
        self._tables = torch.zeros(rows, width, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.fill(None, rows)

    def step(self, size: int) -> StepTensors:
        """The first `size` rows: views of what fill() writes."""
        return StepTensors(
            token_ids=self._rows[0, :size],
            positions=self._rows[1, :size],
            slots=self._rows[2, :size],
            block_tables=self._tables[:size],
            query_starts=self._query_starts[: size + 1],
            context_lens=self._rows[3].view(torch.int32)[:size],
            wanted_rows=None,
        )

    def size_for(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def fill(self, host: HostInputs | None, size: int) -> None:
        """The rows of `host`, one for each sequence, then padding up to `size`. Queued on the current stream."""
        count, width = (0, 1) if host is None else (host.num_tokens, host.block_tables.shape[1])
        token_ids, positions, slots, contexts = self._host_rows.numpy()
        tables = self._host_tables.numpy()[: size * width].reshape(size, width)
        if host is not None:
            token_ids[:count], positions[:count], slots[:count] = host.token_ids, host.positions, host.slots
            contexts.view(np.int32)[:count] = host.context_lens
            tables[:count] = host.block_tables
        token_ids[count:size] = positions[count:size] = tables[count:] = 0
        tables[count:, 0] = self._first_spare
        # All different in a step. A graph is captured over more rows of padding, which write equal KV over one another.
        slots[count:size] = self._first_spare * self._block_tokens + np.arange(size - count) % MOST_PADDING
        contexts.view(np.int32)[count:size] = 1
        self._rows.copy_(self._host_rows, non_blocking=True)
        landed = self._landed_tables[: tables.size]
        landed.copy_(self._host_tables[: tables.size], non_blocking=True)
        self._tables[:size, :width] = landed.view(size, width)


class CapturedDecodes:
    """The graphs of one decoder, for steps of up to `most_rows` plain decodes.

    Nothing is captured before capture(). What run() returns is written over by the next run()."""

    def __init__(self, decoder: Decoder, most_rows: int, device: torch.device) -> None:
        kv, spec = decoder.kv, decoder.spec
        assert kv.spare_blocks >= spare_blocks(kv.layout)
        self._decoder, self._most_rows = decoder, most_rows
        self._inputs = DecodeInputs(kv.layout, kv.num_blocks, most_rows, spec.max_context_tokens, device)
        rows = self._inputs.sizes[-1]
        self._logits = torch.zeros(rows, spec.vocab_size, device=device)
        self._greatest = torch.zeros(rows, device=device)
        self._places = torch.zeros(rows, dtype=torch.int64, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def takes(self, slices: Sequence[Slice]) -> bool:
        return bool(self._graphs) and len(slices) <= self._most_rows and all(map(is_plain_decode, slices))

    @torch.inference_mode()
    def capture(self) -> None:
        """Largest first, so that the smaller ones find their memory in the pool."""
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graphs = {}
        for size in reversed(self._inputs.sizes):
            self._inputs.fill(None, size)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels are compiled and libraries set up before anything is captured
                self._compute(size)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self._compute(size)
            graphs[size] = graph
        torch.cuda.synchronize()
        self._graphs = graphs

    def run(self, host: HostInputs) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits [n, vocab] float32, and of each row the index and the value of the greatest, [n] each."""
        count = host.num_tokens
        size = self._inputs.size_for(count)
        self._inputs.fill(host, size)
        self._graphs[size].replay()
        return self._logits[:count], (self._places[:count], self._greatest[:count])

    def _compute(self, size: int) -> None:
        hidden = self._decoder.forward(self._inputs.step(size))
        assert hidden is not None
        logits = self._decoder.logits(hidden)
        self._logits[:size] = logits
        torch.max(logits, dim=1, out=(self._greatest[:size], self._places[:size]))
