"""What a layer of each kind and the head cost on this device: what pipeline stages are balanced by.

Timed is a decode step of ROWS sequences on the real weights, cut as the first rank's, without the sums over ranks:
one layer of each kind is loaded for it, with the head, and is given back. Caches are swept between the times. Looking
tokens up in the embedding costs next to nothing beside them, and counts with the layer.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

from engine.engine import Engine, EngineOptions
from engine.groups import Groups
from engine.model_base import ModelFiles
from engine.step import StepTensors
from spec.layout import ParallelLayout
from spec.model import ModelSpec
from spec.shard import shard_of

ROWS = 8
CONTEXT_TOKENS = 64
WARM_UPS, TIMES = 2, 7
CACHE_BYTES = 1 << 28  # no cache holds as much: a step comes upon its weights in memory, as one of all layers does


@dataclasses.dataclass(frozen=True, slots=True)
class LayerCosts:
    """Seconds of a decode step; what shard_of() takes."""

    layers: tuple[float, ...]
    head: float


def measure_layer_costs(files: ModelFiles, options: EngineOptions, layout: ParallelLayout) -> LayerCosts:
    """A second or so, and the time to load a layer of each kind. Raises as Engine() does."""
    spec, options = files.spec, dataclasses.replace(options, graph_rows=0)  # a layer alone is timed as it is launched
    first_of_kind = {_kind(spec, layer): layer for layer in reversed(range(spec.num_layers))}
    of_kind: dict[object, float] = {}
    heads: list[float] = []
    for kind, layer in first_of_kind.items():
        of_kind[kind], head_s = _measure(files, options, layout, layer)
        heads.append(head_s)
    return LayerCosts(tuple(of_kind[_kind(spec, layer)] for layer in range(spec.num_layers)), statistics.median(heads))


def _kind(spec: ModelSpec, layer: int) -> object:
    """Layers of one kind cost the same."""
    return spec.layers[layer], spec.mlp_parameters(layer, active=True)


@torch.inference_mode()
def _measure(files: ModelFiles, options: EngineOptions, layout: ParallelLayout, layer: int) -> tuple[float, float]:
    """Seconds of (that layer, the head). Experts are cut over tp alone: those of other ranks cannot be asked here."""
    group, cut = shard_of(files.spec, ParallelLayout(tp=layout.tp), 0), shard_of(files.spec, layout, 0)
    shard = dataclasses.replace(
        group,
        layers=range(layer, layer + 1),
        experts=group.experts[layer : layer + 1],
        intermediate=cut.intermediate,
        held_vocab=cut.held_vocab,
    )
    context_tokens = min(CONTEXT_TOKENS, options.context_of(files.spec))
    blocks_each = -(-context_tokens // options.block_tokens)
    engine = Engine(files, options, ROWS * blocks_each, groups=Groups(shard, options.torch_device()))
    engine.kv.tensor.view(torch.uint8).zero_()  # numbers that are none would be slow
    step = _decode_step(context_tokens, blocks_each, options.block_tokens, engine.device)
    found = engine.decoder.forward(step)
    assert found is not None
    hidden = found
    return (
        _seconds(lambda: engine.decoder.forward(step), engine.device),
        _seconds(lambda: engine.decoder.logits(hidden), engine.device),
    )


def _decode_step(context_tokens: int, blocks_each: int, block_tokens: int, device: torch.device) -> StepTensors:
    tables = torch.arange(ROWS * blocks_each, dtype=torch.int32).view(ROWS, blocks_each)
    position = context_tokens - 1
    slots = tables[:, position // block_tokens].long() * block_tokens + position % block_tokens
    return StepTensors(
        token_ids=torch.arange(ROWS, device=device),
        positions=torch.full((ROWS,), position, device=device),
        slots=slots.to(device),
        block_tables=tables.to(device),
        query_starts=torch.arange(ROWS + 1, dtype=torch.int32, device=device),
        context_lens=torch.full((ROWS,), context_tokens, dtype=torch.int32, device=device),
        wanted_rows=None,
        live=None,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    times = []
    scratch = torch.zeros(CACHE_BYTES, dtype=torch.int8, device=device)
    for _ in range(WARM_UPS + TIMES):
        scratch.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started_s = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[WARM_UPS:])
