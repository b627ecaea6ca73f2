"""What a rank's device has, and what the rank takes of it: the queries behind worker/kv_sizing.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

from engine.engine import Engine
from engine.profiling import run_largest_step, weight_bytes
from service.config import EngineConfig
from spec.errors import InvalidConfiguration
from worker.kv_sizing import MemoryUse

CGROUPS = Path("/sys/fs/cgroup")


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of the device's memory; of a CPU those of the host, or of the control group where that has less."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    host = psutil.virtual_memory()
    limits = [(int(host.available), int(host.total)), *_control_groups()]
    return min(free for free, _ in limits), min(total for _, total in limits)


def _control_groups() -> Iterator[tuple[int, int]]:
    """(free, limit) of the group that a container sees as its root, in either version of the interface. Pages of files
    that were not used for long count as free: the kernel gives them up first."""
    for folder, limit, usage in (
        (CGROUPS, "memory.max", "memory.current"),
        (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # there is none, or "max": no limit
            most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            given_up = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
            yield max(0, min(most, most - used + given_up)), most


def blocks_to_measure(config: EngineConfig, device: torch.device) -> int:
    """Of KV, with which an engine is made that measure() is called for: on a GPU those that a step writes."""
    return -(-config.max_step_tokens // config.block_tokens) if device.type == "cuda" else 1


def measure(engine: Engine, config: EngineConfig, draft: Engine | None = None) -> MemoryUse:
    """Called on every rank of a worker at once, when all have loaded their weights: on a GPU a step of the largest
    batch is executed, and the peak of what it takes counted. `draft`: the engine of a draft model on the same device.

    Raises InvalidConfiguration where that step does not fit, WorkerLost when the ranks lose each other."""
    device, activations = engine.device, 0
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with fitting(device, f"a step of engine.max_step_tokens, {config.max_step_tokens}"):
            run_largest_step(engine, config.max_step_tokens, config.max_sequences)
        torch.cuda.synchronize(device)
        activations = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.empty_cache()
        engine.groups.sum_all(torch.zeros(1, device=device))  # whoever shares the device has given back its own, too
        torch.cuda.synchronize(device)
    free, total = free_and_total(device)
    models = [engine] if draft is None else [engine, draft]
    return MemoryUse(
        device=str(device),
        total_bytes=total,
        free_bytes=free,
        weight_bytes=sum(weight_bytes(each.decoder.weights) for each in models),
        activation_bytes=activations,
        host_free_bytes=free_and_total(torch.device("cpu"))[0],
    )


@contextlib.contextmanager
def fitting(device: torch.device, what: str, fraction: Callable[[], float] = lambda: 1.0) -> Iterator[None]:
    """Raises InvalidConfiguration where the device has no memory for it. `fraction` of it was there by then."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        free, total = free_and_total(device)
        done = fraction()
        missing = ""
        if 0.0 < done < 1.0:
            taken = torch.cuda.memory_allocated(device)
            missing = f", about {max(0.0, taken / done - taken - free) / 2**30:.1f} GiB are missing"
        raise InvalidConfiguration(
            f"{device} of {total / 2**30:.1f} GiB is too small for {what}{missing} ({reason}): lower "
            "engine.max_step_tokens, quantise (engine.quantisation), or take a layout of more ranks (engine.layout)"
        ) from None
