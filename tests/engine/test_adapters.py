"""LoRA adapters against transformers with the adapter merged into its weights, in float32."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranked_engine
from safetensors.torch import load_file, save_file
from stepper import Stepper, rows_of, worst_difference
from tiny_llama import load_reference, reference_of
from tiny_models import make_model

from engine.adapters import AdapterFiles
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from spec.errors import InvalidModel, UnsupportedModel
from spec.layout import ParallelLayout

TOLERANCE = 1e-4
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, model: Any, modules: tuple[str, ...], rank: int, seed: int, **config: Any) -> Path:
    """In PEFT's form, for every linear layer of `model` whose name ends in one of `modules`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(modules):
            rows, columns = module.weight.shape
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.2
            tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.2
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": list(modules), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def merged(base: Path, adapter: Path) -> Any:
    model, config = load_reference(base), json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, module in model.named_modules():
        stem = f"base_model.model.{name}"
        if f"{stem}.lora_A.weight" in tensors:
            delta = tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
            module.weight.data += scale * delta
    return model


@pytest.fixture(scope="module", params=["qwen3", "phi4-partial"])
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, dict[str, Path]]:
    folder = tmp_path_factory.mktemp(request.param)
    base = make_model(folder / "base", request.param)
    model = load_reference(base)
    modules = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj") if "phi4" in request.param else ALL
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


def test_adapters_are_cut_as_the_weights_are(world: tuple[Path, dict[str, Path]]) -> None:
    base, adapters = world
    with ranked_engine(base, ParallelLayout(tp=2, pp=2), 60, adapters=adapters) as engine:
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
