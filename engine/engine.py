"""One rank: executes a step plan on the model, the KV memory and the device that it holds."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.adapters import AdapterFiles
from engine.batch_sharding import StageStep, meet
from engine.cuda_graphs import CapturedDecodes, can_capture, spare_blocks, waits_for_the_device
from engine.decoder import Decoder
from engine.grammar import Grammars, refuse
from engine.groups import Groups
from engine.inputs import HostInputs, targets_of, wanted_rows
from engine.kv_memory import TORCH_DTYPES, KVMemory
from engine.layer_hook import DeviceHooks, LayerHook
from engine.model_base import ModelFiles
from engine.projection import Segments
from engine.speculation import DraftModel, draws_of, verified
from engine.step import StepTensors
from engine.vocabulary_parallel import Sampler
from engine.weights import Quantisation, Rounding, load_experts, load_weights
from scheduler.plan import Draw, Slice, StepPlan, StepResult, TokenLogprobs
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout, ParallelLayout
from spec.model import ModelSpec
from spec.sampling import SamplingParams
from spec.shard import RankShard, Replicas, imbalance, replicas_for, shard_of, with_replicas


@dataclasses.dataclass(frozen=True, slots=True)
class EngineOptions:
    """dtype "auto": float32 for a model stored in float32, bfloat16 for every other, quantised ones included.
    kv_dtype "auto": the same. quantisation, activations: of the weights and of what they multiply, see load_weights.
    device "auto": the GPU where there is one. threads: of the CPU; None leaves torch's number. graph_rows: most
    sequences of a decode step that a GPU replays from a CUDA graph; 0: none. max_context_tokens: no sequence is longer;
    None or more than the model's own: the model's own. Raises InvalidConfiguration for a quantisation or activations
    that are none.
    """

    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = None
    block_tokens: int = 16
    kv_dtype: str = "auto"
    quantisation: Quantisation = "auto"
    activations: Rounding = "kept"
    graph_rows: int = 64
    max_context_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.quantisation not in (known := get_args(Quantisation)):
            raise InvalidConfiguration(f"quantisation {self.quantisation!r} is none; known are {', '.join(known)}")
        if self.activations not in (known := get_args(Rounding)):
            raise InvalidConfiguration(f"activations {self.activations!r} is none; known are {', '.join(known)}")

    def dtype_for(self, spec: ModelSpec) -> Dtype:
        """Raises InvalidConfiguration for a name that is no dtype."""
        if self.dtype != "auto":
            dtype = Dtype.parse(self.dtype)
            if dtype.is_quantised:
                raise InvalidConfiguration(f"dtype {self.dtype} is for the KV memory; computed is in a float dtype")
            return dtype
        return Dtype.FLOAT32 if spec.stored_dtype is Dtype.FLOAT32 else Dtype.BFLOAT16

    def kv_dtype_for(self, spec: ModelSpec) -> Dtype:
        """Raises InvalidConfiguration for a name that is no dtype."""
        return self.dtype_for(spec) if self.kv_dtype == "auto" else Dtype.parse(self.kv_dtype)

    def context_of(self, spec: ModelSpec) -> int:
        return min(self.max_context_tokens or spec.max_context_tokens, spec.max_context_tokens)

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


def kv_layout_for(spec: ModelSpec, options: EngineOptions, shard: RankShard | None = None) -> KVLayout:
    """What an Engine with these options will use: a transport registers the memory before the Engine is built."""
    if options.block_tokens < 1:
        raise InvalidConfiguration(f"block_tokens must be at least 1, is {options.block_tokens}")
    shard = shard or shard_of(spec, ParallelLayout(), 0)
    return shard.kv_layout(spec, options.block_tokens, options.kv_dtype_for(spec))


class Engine:
    """Not thread-safe: one step at a time. `kv_buffer`, where given, must outlive the engine.

    `groups`, where given, is this rank among the others of its worker, who all execute the same steps in one order.
    `replicas`: those with which `groups.shard` was made. `draft_model` makes the guesses that slices propose to have;
    it lives on the same thread. `grammars`: of the rank's vocabulary; without, a sequence with a constraint draws
    NO_TOKEN.
    """

    def __init__(
        self,
        files: ModelFiles,
        options: EngineOptions,
        num_blocks: int,
        kv_buffer: memoryview | None = None,
        progress: Callable[[float], None] | None = None,
        groups: Groups | None = None,
        replicas: Replicas | None = None,
        adapters: Mapping[str, AdapterFiles] | None = None,
        draft_model: DraftModel | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self.spec = dataclasses.replace(files.spec, max_context_tokens=options.context_of(files.spec))
        self.device, self.dtype = options.torch_device(), options.dtype_for(files.spec)
        if options.threads is not None:
            if options.threads < 1:
                raise InvalidConfiguration(f"threads must be at least 1, is {options.threads}")
            torch.set_num_threads(options.threads)
        self.groups = groups or Groups(shard_of(self.spec, ParallelLayout(), 0), self.device)
        self.shard, dtype = self.groups.shard, TORCH_DTYPES[self.dtype]
        self._graph_rows = options.graph_rows if can_capture(self.spec, self.shard, self.device) else 0
        self._kv_layout = kv_layout_for(self.spec, options, self.shard)
        self.kv = self._kv_memory(num_blocks, kv_buffer)
        rounding = options.quantisation, options.activations
        weights = load_weights(files, self.shard, dtype, self.device, progress, adapters, *rounding)
        self._graph_rows = 0 if waits_for_the_device(weights) else self._graph_rows
        self.decoder = Decoder(self.spec, self.shard, weights, self.kv, self.groups, self.device, dtype, replicas)
        self._captured = self._graphs()
        self._device_hooks = DeviceHooks() if self.device.type == "cuda" else None
        self._adapters = frozenset(adapters or ())
        self._draft_model, self._grammars = draft_model, grammars or Grammars(refuse, self.shard.vocab, 1)
        self._sampler = Sampler(self.groups, self.spec.vocab_size)
        self._prepared: tuple[tuple[Slice, ...], HostInputs] | None = None
        self._files, self._rounding, self._replicas = files, rounding, replicas or {}

    def place_kv(self, num_blocks: int, kv_buffer: memoryview | None = None) -> None:
        """KV memory of that size in place of what is held, as the constructor takes it: before warm_up(), and before
        any sequence holds a block."""
        self.kv = self._kv_memory(num_blocks, kv_buffer)
        self.decoder.place_kv(self.kv)
        self._captured = self._graphs()

    @property
    def graph_failure(self) -> str:
        """Why decode steps are launched kernel by kernel though graphs were wanted; "" where that is not so."""
        return "" if self._captured is None else self._captured.failure

    def _kv_memory(self, num_blocks: int, kv_buffer: memoryview | None) -> KVMemory:
        value_dim = None if self.spec.latent is None else self.spec.latent.kv_rank
        spare = spare_blocks(self._kv_layout) if self._graph_rows else 0
        return KVMemory(self._kv_layout, num_blocks, self.device, kv_buffer, value_dim, spare)

    def _graphs(self) -> CapturedDecodes | None:
        return CapturedDecodes(self.decoder, self._graph_rows, self.device) if self._graph_rows else None

    @torch.inference_mode()
    def execute(
        self, plan: StepPlan, hook: LayerHook | None = None, meanwhile: Callable[[], None] = lambda: None
    ) -> StepResult:
        """Writes the KV of every slice's tokens into its blocks and draws where a slice says so.

        The hook hears which layers have written. `meanwhile()` is called once, on this thread: on a GPU when the
        layers are queued, on the CPU, where this thread computes them, right before. Only a rank of the last stage has
        a result; in the others nothing is drawn. A plan without slices is a rank's share of a step in which its group
        has no sequence. Raises WorkerLost when the ranks lose each other.
        """
        if not plan.slices:
            meanwhile()
            self.decoder.follow(self._meet(None, 0))
            return StepResult((), ())
        if hook is not None and self._device_hooks is not None:
            hook = self._device_hooks.following(hook)
        slices = plan.slices if self._draft_model is None else self._draft_model.guess(plan.slices)
        draws = [draws_of(piece) for piece in slices] if self.shard.is_last_stage else []
        pending, flat = self._grammars.start(slices, draws), list(itertools.chain.from_iterable(draws))
        host = self._inputs_of(slices, plan.ahead)
        rest: Iterator[Tensor] = iter(())
        none_drawn = StepResult(((),) * len(slices), ((),) * len(slices))
        if self._captured is not None and not (hook and hook.ends) and self._captured.takes(slices):
            found_rows = self._captured.run(host)  # the device has its work
            meanwhile()
            if found_rows is None:
                return none_drawn
            logits, best = found_rows
        else:
            wanted, num_drawn = wanted_rows(slices)
            step = self._step_tensors(slices, host, wanted)
            stage = self._meet(step, num_drawn)
            hidden = self.decoder.forward(step, hook, meanwhile, stage)
            if hidden is None:
                return none_drawn
            rest = self.decoder.heads(hidden, num_drawn, stage)
            logits, best = next(rest), None
        masks = self._grammars.join(pending)
        found = iter(self._sampler.draw(logits, flat, masks.allowed, best) if flat else ())
        drawn = tuple(
            verified(piece.guessed_token_ids, list(itertools.islice(found, len(each))))
            for piece, each in zip(slices, draws, strict=True)
        )
        drawn = self._grammars.settle(slices, draws, drawn, masks)
        return StepResult(drawn, self._prompt_logprobs(slices, rest))

    def warm_up(self) -> None:
        """A small chunk and a decode step, so that the first request pays for no one-time set-up; on a GPU the graphs
        of decode steps. Writes into the first blocks: call it before any sequence holds one."""
        num_tokens = min(32, self.kv.num_blocks * self.kv.layout.block_tokens - 1, self.spec.max_context_tokens - 1)
        table = tuple(range(self.kv.layout.blocks_for(num_tokens + 1)))
        greedy = SamplingParams(temperature=0.0)
        for start, count in ((0, num_tokens), (num_tokens, 1)):
            each = Draw(greedy, start + count, num_tokens, ())
            self.execute(StepPlan(0, (Slice("warm-up", (0,) * count, start, table, each),)))
        if self._captured is not None:
            self._captured.capture()
        if self.decoder.experts is not None:
            self.decoder.experts.loads.zero_()

    def replicate_experts(self, copies: int) -> tuple[float, float]:
        """Called on every rank between the same two steps: of each layer `copies` more experts are held, by the load
        since the last call (replicas_for), where that is better than what is. Every rank finds the same placement, and
        reads the layers in which its own experts change.

        Returns the imbalance() of that load as it was placed, and as it is now. Raises WorkerLost when the ranks lose
        each other."""
        experts, shard, parts = self.decoder.experts, self.decoder.shard, self.shard.layout.ep
        assert experts is not None
        loads = torch.zeros(self.spec.num_layers, experts.loads.shape[1], dtype=torch.int64, device=self.device)
        if shard.index == 0:  # the ranks of a group see the same rows
            loads[shard.layers.start : shard.layers.stop] = experts.loads
        counted = self.groups.sum_all(loads).tolist()
        replicas = replicas_for(counted, parts, copies)
        before, after = imbalance(counted, parts, self._replicas), imbalance(counted, parts, replicas)
        if after >= before:
            experts.loads.zero_()
            return before, before
        placed, dtype = with_replicas(self.spec, shard, replicas), TORCH_DTYPES[self.dtype]
        self.decoder.place_experts(
            placed,
            replicas,
            lambda layer: load_experts(self._files, placed, layer, dtype, self.device, *self._rounding),
        )
        self._replicas = replicas
        if self._captured is not None:
            self._captured.capture()  # graphs hold the addresses of the experts that were
        return before, after

    def prepare(self, slices: tuple[Slice, ...]) -> None:
        """Called `meanwhile`. The next plan may have come of these slices (its `ahead`): of its inputs that much is
        made now. Nothing is lost where it has not."""
        self._prepared = slices, HostInputs(slices, self.kv.layout.block_tokens)

    def _inputs_of(self, slices: tuple[Slice, ...], ahead: tuple[Slice, ...] | None) -> HostInputs:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared[0] is ahead:
            host = prepared[1]
        else:
            host = HostInputs(slices, self.kv.layout.block_tokens)
        host.complete(slices, self.kv.num_blocks, self.spec.vocab_size, self.spec.max_context_tokens)
        return host

    def _meet(self, step: StepTensors | None, num_drawn: int) -> StageStep | None:
        """None where no group of the stage needs to know of the others."""
        if self.shard.layout.mlp != "stage":
            return None
        return meet(self.groups, self.device, sorted(self._adapters), step, num_drawn)

    def _step_tensors(self, slices: tuple[Slice, ...], host: HostInputs, wanted: list[int] | None) -> StepTensors:
        return StepTensors(
            token_ids=self._on_device(host.token_ids),
            positions=self._on_device(host.positions),
            slots=self._on_device(host.slots),
            block_tables=self._on_device(host.block_tables),
            query_starts=self._on_device(host.query_starts),
            context_lens=self._on_device(host.context_lens),
            wanted_rows=None if wanted is None else self._on_device(np.asarray(wanted, np.int64)),
            live=None,
            **self._adapter_rows(slices, host.slice_of, wanted),
        )

    def _adapter_rows(
        self, slices: tuple[Slice, ...], slice_of: NDArray[np.int64], wanted: list[int] | None
    ) -> dict[str, Segments]:
        """`slice_of`: the slice of each row."""
        asked = {piece.adapter for piece in slices if piece.adapter}
        if not asked:
            return {}
        assert asked <= self._adapters
        each = np.asarray([piece.adapter for piece in slices])[slice_of]

        def segments(of_row: NDArray[np.str_]) -> Segments:
            names: Iterable[str] = sorted({str(name) for name in of_row if name})
            return tuple((name, self._on_device(np.flatnonzero(of_row == name))) for name in names)

        return {"adapters": segments(each), "wanted_adapters": segments(each if wanted is None else each[wanted])}

    def _on_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.to(self.device, non_blocking=True)

    def _prompt_logprobs(
        self, slices: tuple[Slice, ...], runs: Iterator[Tensor]
    ) -> tuple[tuple[TokenLogprobs, ...], ...]:
        """runs: logits of the rows of every slice's prompt_targets, in order. One tuple per slice, empty where none
        asked."""
        found: list[TokenLogprobs] = []
        asked = [(t, piece.prompt_logprobs or 0) for piece in slices for t in targets_of(piece)]
        for logits in runs:
            found.extend(self._sampler.token_logprobs(logits, asked[len(found) : len(found) + len(logits)]))
        each = iter(found)
        return tuple(tuple(itertools.islice(each, len(targets_of(piece)))) for piece in slices)
