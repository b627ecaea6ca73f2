"""Decode steps on a GPU, replayed from CUDA graphs: a step is then one launch, and not hundreds.

A graph has fixed shapes and addresses. So there is one for each of a few numbers of rows, the sizes, and a step takes
the smallest that holds it. Its inputs lie in tensors that stay where they are, and rows that no sequence needs are
padding: token 0 at position 0 of a spare block behind those of the KV memory that sequences own. A padding row reads
and writes there alone, and nothing reads what it gives.

Head and argmax are in the graph, and the sums over the ranks of a group, too: these all replay the same graph in the
same step. What goes from stage to stage does so outside. All graphs share one pool of memory: one runs at a time.

A device or library that cannot capture leaves the steps as they are, launched kernel by kernel; `failure` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder
from engine.inputs import HostInputs
from engine.step import StepTensors
from engine.weights import ModelWeights, MoeWeights
from scheduler.plan import Slice
from spec.layout import KVLayout
from spec.model import ModelSpec
from spec.shard import RankShard

MOST_PADDING = 7  # rows: what lies between two neighbours of sizes_up_to


def can_capture(spec: ModelSpec, shard: RankShard, device: torch.device) -> bool:
    """Not where groups send rows to each other: how many go where is known to the host alone."""
    apart = shard.layout.dp == 1 or (spec.moe is None and shard.layout.mlp != "stage")
    return device.type == "cuda" and apart


def waits_for_the_device(weights: ModelWeights) -> bool:
    """Experts that no launch computes together go one by one, each on its rows, and the host counts them."""
    return any(isinstance(layer.mlp, MoeWeights) and layer.mlp.experts.grouped is None for layer in weights.layers)


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

    The spare blocks are those from `first_spare` on."""

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
        self._landed = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        self._host_rows = torch.zeros(5, rows, dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.zeros(rows * width, dtype=torch.int32, pin_memory=pinned)
        self._rows = torch.zeros(5, rows, dtype=torch.int64, device=device)
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
            live=self._rows[4, :size],
        )

    def size_for(self, num_rows: int) -> int:
        return next(size for size in self.sizes if size >= num_rows)

    def fill(self, host: HostInputs | None, size: int) -> None:
        """The rows of `host`, one for each sequence, then padding up to `size`. Queued on the current stream."""
        if self._landed is not None:
            self._landed.synchronize()  # the host's side has been read
        count, width = (0, 1) if host is None else (host.num_tokens, host.block_tables.shape[1])
        token_ids, positions, slots, contexts, live = self._host_rows.numpy()
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
        live[:count], live[count:size] = 1, 0
        self._rows.copy_(self._host_rows, non_blocking=True)
        landed = self._landed_tables[: tables.size]
        landed.copy_(self._host_tables[: tables.size], non_blocking=True)
        if self._landed is not None:
            self._landed.record()
        self._tables[:size, :width] = landed.view(size, width)


class GraphRecorder:
    """Of the current GPU. What it returns does the recorded work again, on the current stream."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # kernels are compiled and libraries set up before anything is captured
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class CapturedDecodes:
    """The graphs of one rank's decoder, for steps of up to `most_rows` plain decodes.

    Nothing is captured before capture(). What run() returns is written over by the next run(). `recorder` makes what
    records: one for all sizes."""

    def __init__(
        self,
        decoder: Decoder,
        most_rows: int,
        device: torch.device,
        recorder: Callable[[], Callable[[Callable[[], None]], Callable[[], None]]] = GraphRecorder,
    ) -> None:
        kv, spec, shard = decoder.kv, decoder.spec, decoder.shard
        assert kv.spare_blocks >= spare_blocks(kv.layout)
        self._decoder, self._most_rows, self._device, self._recorder = decoder, most_rows, device, recorder
        self._inputs = DecodeInputs(kv.layout, kv.num_blocks, most_rows, spec.max_context_tokens, device)
        rows = self._inputs.sizes[-1]

        def stream() -> Tensor:
            return torch.zeros(rows, spec.hidden_size, dtype=decoder.dtype, device=device)

        self._came = None if shard.is_first_stage else stream()
        self._leaves = None if shard.is_last_stage else stream()
        self._logits = torch.zeros(rows if shard.is_last_stage else 0, len(shard.vocab), device=device)
        self._greatest = torch.zeros(rows, device=device)
        self._places = torch.zeros(rows, dtype=torch.int64, device=device)
        self._graphs: dict[int, Callable[[], None]] = {}
        self.failure = ""  # of capture(): why there are no graphs

    def takes(self, slices: Sequence[Slice]) -> bool:
        return bool(self._graphs) and len(slices) <= self._most_rows and all(map(is_plain_decode, slices))

    @torch.inference_mode()
    def capture(self) -> None:
        """Largest first, so that the smaller ones find their memory in the pool. Called by all ranks of the worker at
        once: where one cannot capture, none has graphs. Raises WorkerLost when the ranks lose each other."""
        self._graphs, self.failure = {}, ""
        record, graphs = self._recorder(), {}
        for size in reversed(self._inputs.sizes):
            self._inputs.fill(None, size)
            failure = ""
            try:
                graphs[size] = record(functools.partial(self._compute, size))
            except Exception as error:  # whatever it is, steps go on without graphs
                failure = f"{size} rows: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            failed = torch.full((1,), int(bool(failure)), device=self._device)
            if int(self._decoder.groups.sum_all(failed)):
                self.failure = failure or f"{size} rows: another rank could not"
                return
        self._graphs = graphs

    def run(self, host: HostInputs) -> tuple[Tensor, tuple[Tensor, Tensor] | None] | None:
        """Logits [n, the rank's vocabulary] float32, and where that is all of it, of each row the index and the value
        of the greatest, [n] each. None in a stage that is not the last, whose rows have gone on to the next."""
        count, groups = host.num_tokens, self._decoder.groups
        size = self._inputs.size_for(count)
        self._inputs.fill(host, size)
        if self._came is not None:
            groups.receive(self._came[:count])
        self._graphs[size]()
        if self._leaves is not None:
            groups.send(self._leaves[:count].clone())  # the next step writes over them
            return None
        whole = self._logits.shape[1] == self._decoder.spec.vocab_size
        return self._logits[:count], (self._places[:count], self._greatest[:count]) if whole else None

    def _compute(self, size: int) -> None:
        step = self._inputs.step(size)
        stream = self._decoder.embed(step.token_ids) if self._came is None else self._came[:size]
        rows = self._decoder.compute(stream, step)
        if self._leaves is not None:
            self._leaves[:size] = rows
            return
        logits = self._decoder.logits(rows)
        self._logits[:size] = logits
        torch.max(logits, dim=1, out=(self._greatest[:size], self._places[:size]))
