"""The draft model of a decode worker: opened beside the model, on the same device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from engine.speculation import check_draft
from service.config import WorkerConfig
from service.model_source import resolve_model
from spec.model import ModelSpec
from worker.device_memory import fitting


def open_draft_model(
    config: WorkerConfig,
    target: ModelSpec,
    options: EngineOptions,
    max_context_tokens: int,
    report: Callable[[str, float], None],
) -> Engine | None:
    """None where none is configured, and for a prefill worker, which draws one token of an answer and needs no guess.

    Its KV memory is still to be placed: as many blocks as the model has, in memory of its own. Raises the SetupErrors
    of opening a model, and InvalidConfiguration for one that cannot guess for this one."""
    name = config.engine.draft_model
    if name is None or config.role == "prefill":
        return None
    files = open_model(resolve_model(name, lambda fraction: report("fetching the draft model", fraction)))
    check_draft(target, files.spec, max_context_tokens)
    with fitting(options.torch_device(), "the draft model beside the model"):
        return Engine(
            files,
            dataclasses.replace(options, kv_dtype="auto"),
            num_blocks=1,
            progress=lambda fraction: report("loading the draft model", fraction),
        )
