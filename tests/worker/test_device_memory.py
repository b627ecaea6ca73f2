"""What is asked of a device, and what is said where it has too little."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from tiny_llama import SHAPES, make_llama
from tiny_models import make_model

from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from engine.profiling import largest_step, run_largest_step, weight_bytes
from service.config import EngineConfig
from spec.errors import InvalidConfiguration
from worker import device_memory
from worker.device_memory import blocks_to_measure, fitting, free_and_total, measure

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
GIB = 1 << 30


def test_a_card_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: {CUDA: (3, 7)}[device])
    assert free_and_total(CUDA) == (3, 7)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_control_group_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    host = SimpleNamespace(available=50 * GIB, total=60 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    monkeypatch.setattr(device_memory, "CGROUPS", tmp_path)
    assert free_and_total(CPU) == (50 * GIB, 60 * GIB)
    folder, names = tmp_path, ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        folder, names = tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        folder.mkdir()
    (folder / names[0]).write_text(f"{8 * GIB}\n")
    (folder / names[1]).write_text(f"{6 * GIB}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {GIB}\n")
    assert free_and_total(CPU) == (3 * GIB, 8 * GIB)
    (folder / names[0]).write_text("max\n" if version == 2 else "9223372036854771712\n")
    assert free_and_total(CPU) == (50 * GIB, 60 * GIB)


def test_weights_are_counted_once(tmp_path: Path) -> None:
    """All of a model with tied embeddings, and of one with experts; alignment and panels add a little."""
    for folder in (make_llama(tmp_path / "llama", SHAPES[0]), make_model(tmp_path / "mixtral", "mixtral")):
        files = open_model(folder)
        engine = Engine(files, EngineOptions(device="cpu", dtype="float32"), 4)
        stored = 4 * files.spec.num_parameters
        assert stored <= weight_bytes(engine.decoder.weights) <= 1.5 * stored
    shared = torch.zeros(1000)
    assert weight_bytes({"a": (shared, [shared[5:]]), "b": torch.zeros(3, dtype=torch.int8)}) == 4003


def test_a_rank_on_a_cpu_is_measured_without_a_step(tmp_path: Path) -> None:
    engine = Engine(open_model(make_llama(tmp_path, SHAPES[0])), EngineOptions(device="cpu"), 1)
    use = measure(engine, EngineConfig(), draft=engine)
    assert use.device == "cpu"
    assert use.weight_bytes == 2 * weight_bytes(engine.decoder.weights)
    assert use.activation_bytes == 0
    assert 0 < use.free_bytes == pytest.approx(use.host_free_bytes, rel=0.2)
    assert use.free_bytes <= use.total_bytes


@pytest.mark.parametrize(
    ("max_step_tokens", "max_sequences", "counts"),
    [(40, 5, [36, 1, 1, 1, 1]), (7, 9, [1] * 7), (300, 3, [128, 128, 44]), (3, 1, [3])],
)
def test_the_largest_step(max_step_tokens: int, max_sequences: int, counts: list[int]) -> None:
    plan = largest_step(max_step_tokens, max_sequences, 128, 16, 3)
    assert [len(piece.token_ids) for piece in plan.slices] == counts
    assert plan.num_tokens == min(max_step_tokens, 128 * max_sequences)
    assert all(piece.start + len(piece.token_ids) == 128 for piece in plan.slices)
    assert all(piece.block_table == (0, 1, 2, 0, 1, 2, 0, 1) for piece in plan.slices)


@pytest.mark.parametrize("name", ["llama3", "mixtral", "deepseek-v2"])
def test_the_largest_step_runs_in_the_blocks_that_are_there_to_measure(tmp_path: Path, name: str) -> None:
    config = EngineConfig(max_step_tokens=70, max_sequences=6, block_tokens=8)
    options = EngineOptions(device="cpu", block_tokens=8)
    engine = Engine(open_model(make_model(tmp_path, name)), options, blocks_to_measure(config, CUDA))
    assert engine.kv.num_blocks == 9
    heard = []
    execute = engine.execute
    engine.execute = lambda plan: heard.append(execute(plan))  # type: ignore[assignment, method-assign, return-value]
    run_largest_step(engine, 70, 6)
    (result,) = heard
    assert [len(drawn) for drawn in result.drawn] == [1] * 6


def test_a_card_on_which_weights_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of them took 5 GiB, so 15 more are wanted, and 4 are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * GIB, 10 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 5 * GIB)
    with (
        pytest.raises(InvalidConfiguration, match=r"cuda:1 of 10\.0 GiB .* the weights, about 11\.0 GiB are missing"),
        fitting(CUDA, "the weights", lambda: 0.25),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has")
    with pytest.raises(ValueError, match="another"), fitting(CUDA, "the weights"):
        raise ValueError("another")
