"""One rank: executes a step plan on the model, the KV memory and the device that it holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder, StepTensors
from engine.kv_memory import TORCH_DTYPES, KVMemory
from engine.model_base import ModelFiles
from engine.sampling import draw, token_logprobs
from engine.weights import load_weights
from scheduler.plan import Draw, Slice, StepPlan, StepResult, TokenLogprobs
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout
from spec.model import ModelSpec
from spec.sampling import SamplingParams

PROMPT_ROWS_AT_ONCE = 64  # whose logits exist at the same time when log-probabilities of a prompt are asked for


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """dtype "auto": float32 for a model stored in float32, bfloat16 for every other, quantized ones included; the KV
    memory has it too. device "auto": the GPU where there is one. threads: of the CPU; None leaves torch's number.
    """

    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    block_tokens: int = 16

    def dtype_for(self, spec: ModelSpec) -> Dtype:
        """Raises InvalidConfiguration for a name that is no dtype."""
        if self.dtype != "auto":
            return Dtype.parse(self.dtype)
        return Dtype.FLOAT32 if spec.stored_dtype is Dtype.FLOAT32 else Dtype.BFLOAT16

    def torch_device(self) -> torch.device:
        """Raises InvalidConfiguration for a device that is unknown or not in this machine."""
        has_gpu = torch.cuda.is_available()
        if self.device == "auto":
            return torch.device("cuda" if has_gpu else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise InvalidConfiguration(f"unknown device {self.device!r}; known are auto, cpu, cuda, cuda:N") from None
        if device.type not in ("cpu", "cuda"):
            raise InvalidConfiguration(f"device {self.device!r} is not supported; known are auto, cpu, cuda, cuda:N")
        if device.type == "cuda" and not (has_gpu and (device.index or 0) < torch.cuda.device_count()):
            raise InvalidConfiguration(f"device {self.device!r} was asked for, and this machine does not have it")
        return device


def kv_layout_for(spec: ModelSpec, options: EngineOptions) -> KVLayout:
    """What an Engine with these options will use: a transport registers the memory before the Engine is built."""
    if options.block_tokens < 1:
        raise InvalidConfiguration(f"block_tokens must be at least 1, is {options.block_tokens}")
    return spec.kv_layout(options.block_tokens, options.dtype_for(spec))


class Engine:
    """Not thread-safe: one step at a time. `kv_buffer`, where given, must outlive the engine."""

    def __init__(
        self,
        files: ModelFiles,
        options: EngineOptions,
        num_blocks: int,
        kv_buffer: memoryview | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        self.spec, self.device, self.dtype = files.spec, options.torch_device(), options.dtype_for(files.spec)
        if options.threads is not None:
            if options.threads < 1:
                raise InvalidConfiguration(f"threads must be at least 1, is {options.threads}")
            torch.set_num_threads(options.threads)
        self.kv = KVMemory(kv_layout_for(self.spec, options), num_blocks, self.device, kv_buffer)
        weights = load_weights(files, TORCH_DTYPES[self.dtype], self.device, progress)
        self.decoder = Decoder(self.spec, weights, self.kv, self.device)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Writes the KV of every slice's tokens into its blocks and draws where a slice says so.

        `on_layer(i)` is called during the step, on this thread, when layer i's KV is written (see Decoder.forward). An
        exception of it ends the step; the KV of the slices is then undefined.
        """
        if not plan.slices:
            return StepResult((), ())
        wanted, num_drawn = _wanted_rows(plan.slices)
        hidden = self.decoder.forward(self._step_tensors(plan.slices, wanted), on_layer)
        draws = [piece.draw for piece in plan.slices if piece.draw is not None]
        drawn = iter(draw(self.decoder.logits(hidden[:num_drawn]), draws) if draws else ())
        prompt_logprobs = self._prompt_logprobs(plan.slices, hidden[num_drawn:])
        return StepResult(tuple(None if piece.draw is None else next(drawn) for piece in plan.slices), prompt_logprobs)

    def warm_up(self) -> None:
        """A small chunk and a decode step, so that the first request pays for no one-time set-up. Writes into the first
        blocks: call it before any sequence holds one."""
        num_tokens = min(32, self.kv.num_blocks * self.kv.layout.block_tokens - 1, self.spec.max_context_tokens - 1)
        table = tuple(range(self.kv.layout.blocks_for(num_tokens + 1)))
        greedy = SamplingParams(temperature=0.0)
        for start, count in ((0, num_tokens), (num_tokens, 1)):
            each = Draw(greedy, start + count, num_tokens, ())
            self.execute(StepPlan(0, (Slice("warm-up", (0,) * count, start, table, each),)))

    def _step_tensors(self, slices: tuple[Slice, ...], wanted: list[int] | None) -> StepTensors:
        """One pass over the slices, then whole arrays. See StepTensors for shapes."""
        block_tokens = self.kv.layout.block_tokens
        counts = np.fromiter((len(piece.token_ids) for piece in slices), np.int64, len(slices))
        starts = np.fromiter((piece.start for piece in slices), np.int64, len(slices))
        ends = starts + counts
        query_starts = np.zeros(len(slices) + 1, np.int64)
        np.cumsum(counts, out=query_starts[1:])
        num_tokens = int(query_starts[-1])
        widths = [-(-int(end) // block_tokens) for end in ends]
        tables = np.zeros((len(slices), max(widths)), np.int32)
        for row, (piece, width) in enumerate(zip(slices, widths, strict=True)):
            assert len(piece.block_table) >= width
            tables[row, :width] = piece.block_table[:width]
        positions = np.arange(num_tokens) + np.repeat(starts - query_starts[:-1], counts)
        sequence = np.repeat(np.arange(len(slices)), counts)
        slots = tables[sequence, positions // block_tokens].astype(np.int64) * block_tokens + positions % block_tokens
        token_ids = np.fromiter(itertools.chain.from_iterable(p.token_ids for p in slices), np.int64, num_tokens)
        assert counts.min() > 0
        assert ends.max() <= self.spec.max_context_tokens
        assert tables.min() >= 0
        assert tables.max() < self.kv.num_blocks
        assert token_ids.min() >= 0
        assert token_ids.max() < self.spec.vocab_size
        return StepTensors(
            token_ids=self._on_device(token_ids),
            positions=self._on_device(positions),
            slots=self._on_device(slots),
            block_tables=self._on_device(tables),
            query_starts=self._on_device(query_starts.astype(np.int32)),
            context_lens=self._on_device(ends.astype(np.int32)),
            wanted_rows=None if wanted is None else self._on_device(np.asarray(wanted, np.int64)),
        )

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _prompt_logprobs(self, slices: tuple[Slice, ...], hidden: Tensor) -> tuple[tuple[TokenLogprobs, ...], ...]:
        """hidden: the rows of every slice's prompt_targets, in order. One tuple per slice, empty where none asked."""
        found: list[TokenLogprobs] = []
        asked = [(t, piece.prompt_logprobs or 0) for piece in slices for t in _targets(piece)]
        for start in range(0, len(asked), PROMPT_ROWS_AT_ONCE):
            rows = self.decoder.logits(hidden[start : start + PROMPT_ROWS_AT_ONCE]).cpu().numpy()
            pairs = zip(rows, asked[start : start + PROMPT_ROWS_AT_ONCE], strict=True)
            found.extend(token_logprobs(row, target, num_top) for row, (target, num_top) in pairs)
        each = iter(found)
        return tuple(tuple(itertools.islice(each, len(_targets(piece)))) for piece in slices)


def _targets(piece: Slice) -> tuple[int, ...]:
    return () if piece.prompt_logprobs is None else piece.prompt_targets


def _wanted_rows(slices: tuple[Slice, ...]) -> tuple[list[int] | None, int]:
    """Rows of the step that go through the head: first those that draw, then those whose prompt log-probabilities are
    asked for. (None, n) when these are all n rows in order, as in a step of decodes alone."""
    drawing: list[int] = []
    prompt: list[int] = []
    row = 0
    for piece in slices:
        if _targets(piece):
            prompt.extend(range(row, row + len(piece.prompt_targets)))
        row += len(piece.token_ids)
        if piece.draw is not None:
            drawing.append(row - 1)
    if not prompt and len(drawing) == row:
        return None, row
    return drawing + prompt, len(drawing)
