"""LoRA adapters against transformers with the adapter merged into its weights, in float32."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranked_engine
from safetensors.torch import load_file, save_file
from stepper import Stepper, rows_of, worst_difference
from tiny_adapters import LLAMA_MODULES, merged, write_adapter
from tiny_llama import load_reference, reference_of
from tiny_models import make_model

from engine.adapters import AdapterFiles
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from spec.errors import InvalidModel, UnsupportedModel
from spec.layout import ParallelLayout

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["qwen3", "phi4-partial"])
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_model(folder / "base", request.param)
    model = load_reference(base)
    modules = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") if "phi4" in request.param else LLAMA_MODULES
    return base, {
        "all": write_adapter(folder / "all", model, modules, 5, 1),
        "few": write_adapter(folder / "few", model, (modules[1], modules[-1]), 3, 2, use_rslora=True),
    }


def run(stepper: Stepper, base: Path, adapters: dict[str, Path]) -> None:
    """Every sequence with another adapter, or none, in steps that mix them."""
    generator = random.Random(4)
    running = []
    for i, adapter in enumerate(["", "all", "few", "all", ""]):
        each = stepper.add(f"s{i}", [generator.randrange(131) for _ in range(23 + i)], 20)
        each.adapter = adapter
        running.append(each)
    while pending := [each for each in running if each.computed < len(each.token_ids)]:
        taken = generator.sample(pending, generator.randrange(1, len(pending) + 1))
        stepper.step([(each, max(1, min(9, each.num_prompt - each.computed))) for each in taken])
    oracles = {"": load_reference(base)} | {name: merged(base, path) for name, path in adapters.items()}
    for each in running:
        expected = reference_of(oracles[each.adapter], each.token_ids)
        assert worst_difference(rows_of(each), expected) < TOLERANCE, each.name


def test_many_adapters_in_one_batch(world: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = world
    files = open_model(base)
    loaded = {name: AdapterFiles(path, files.spec) for name, path in adapters.items()}
    run(Stepper(Engine(files, EngineOptions(device="cpu"), 60, adapters=loaded)), base, adapters)


@pytest.mark.parametrize("layout", [ParallelLayout(tp=2, pp=2), ParallelLayout(dp=2, mlp="stage")], ids=str)
def test_adapters_are_cut_as_the_weights_are(world: tuple[Path, dict[str, Path]], layout: ParallelLayout) -> None:
    base, adapters = world
    with ranked_engine(base, layout, 60, adapters=adapters) as engine:
        run(Stepper(engine), base, adapters)


def test_a_revision_is_of_every_byte(world: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, adapters = world
    spec = open_model(base).spec
    file = adapters["few"] / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] += 1e-3
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / file.name)
    (other / "adapter_config.json").write_bytes((adapters["few"] / "adapter_config.json").read_bytes())
    assert AdapterFiles(other, spec).revision != AdapterFiles(adapters["few"], spec).revision


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"use_dora": True}, UnsupportedModel, "use_dora"),
        ({"bias": "all"}, UnsupportedModel, "bias"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModel, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, UnsupportedModel, "single layers"),
        ({"r": 0}, InvalidModel, "above 0"),
        ({"r": 3.7}, InvalidModel, "whole number"),
        ({"r": float("inf")}, InvalidModel, "whole number"),
        ({"r": 10**400}, InvalidModel, "does not fit"),
        ({"lora_alpha": float("nan")}, InvalidModel, "finite"),
        ({"lora_alpha": float("inf")}, InvalidModel, "finite"),
        ({"lora_alpha": 10**400}, InvalidModel, "does not fit"),
        ({"lora_alpha": "6"}, InvalidModel, "finite"),
        ({"r": 4}, InvalidModel, "expected"),
        ({"peft_type": "LOHA"}, UnsupportedModel, "LOHA"),
    ],
)
def test_what_is_no_plain_adapter_is_refused(
    world: tuple[Path, dict[str, Path]], tmp_path: Path, changes: dict[str, Any], error: type, words: str
) -> None:
    base, adapters = world
    config = json.loads((adapters["few"] / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = adapters["few"] / "adapter_model.safetensors"
    (tmp_path / tensors.name).write_bytes(tensors.read_bytes())
    with pytest.raises(error, match=words):
        AdapterFiles(tmp_path, open_model(base).spec)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_what_an_adapter_does_not_say_is_not_made_up(
    world: tuple[Path, dict[str, Path]], tmp_path: Path, key: str
) -> None:
    base, adapters = world
    config = json.loads((adapters["few"] / "adapter_config.json").read_text())
    del config[key]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidModel, match=f"it has no '{key}'"):
        AdapterFiles(tmp_path, open_model(base).spec)


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda weight: weight.index_fill(0, torch.tensor(1), torch.nan), InvalidModel, "not finite"),
        (lambda weight: weight.to(torch.int8), UnsupportedModel, "I8"),
        (lambda weight: weight.to(torch.float8_e4m3fn), UnsupportedModel, "F8_E4M3"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(
    world: tuple[Path, dict[str, Path]],
    tmp_path: Path,
    spoil: Callable[[torch.Tensor], torch.Tensor],
    error: type,
    words: str,
) -> None:
    base, adapters = world
    (tmp_path / "adapter_config.json").write_bytes((adapters["few"] / "adapter_config.json").read_bytes())
    tensors = load_file(adapters["few"] / "adapter_model.safetensors")
    name = sorted(tensors)[-1]
    save_file(tensors | {name: spoil(tensors[name])}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(error, match=words):
        AdapterFiles(tmp_path, open_model(base).spec)


def test_damaged_files_are_said(world: tuple[Path, dict[str, Path]], tmp_path: Path) -> None:
    base, adapters = world
    spec = open_model(base).spec
    with pytest.raises(InvalidModel, match="no adapter"):
        AdapterFiles(tmp_path, spec)
    (tmp_path / "adapter_config.json").write_bytes((adapters["few"] / "adapter_config.json").read_bytes())
    with pytest.raises(InvalidModel, match="cannot be read"):
        AdapterFiles(tmp_path, spec)
    whole = (adapters["few"] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidModel, match="cut short"):
        AdapterFiles(tmp_path, spec)
    tensors = load_file(adapters["few"] / "adapter_model.safetensors")
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InvalidModel, match="lacks"):
        AdapterFiles(tmp_path, spec)
