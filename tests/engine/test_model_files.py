"""What lies on disk: read lazily and whole, or refused with a typed error that says what is wrong and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import Shape, load_reference, make_llama

from engine.families import tensor_shapes
from engine.model_files import open_model
from spec.dtype import Dtype
from spec.errors import InvalidModel, UnsupportedModel

KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), Shape("untied", tie_word_embeddings=False))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    load_reference(pristine).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    return tmp_path / "sharded"


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name)
        if value is not None:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("form", ["folder", "sharded"])
def test_tensors_are_those_that_were_saved(form: str, pristine: Path, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(form)
    assert form == "folder" or len(list(path.glob("*.safetensors"))) > 2
    files, expected = open_model(path), load_reference(pristine).state_dict()
    assert files.names == set(expected)
    for name, shape in tensor_shapes(files.spec).items():
        assert files.shape(name) == shape == tuple(expected[name].shape)
        torch.testing.assert_close(files.tensor(name), expected[name], rtol=0, atol=0)
        torch.testing.assert_close(files.tensor(name, torch.bfloat16), expected[name].bfloat16(), rtol=0, atol=0)
    assert files.spec.stored_dtype is Dtype.FLOAT32


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_what_the_files_hold(folder: Path, kind: torch.dtype) -> None:
    load_reference(folder).to(kind).save_pretrained(folder)
    assert open_model(folder).spec.stored_dtype.value == str(kind).removeprefix("torch.")


def test_end_tokens_of_generation_config_count_too(folder: Path) -> None:
    assert open_model(folder).spec.eos_token_ids == (2,)
    edit_json(folder / "generation_config.json", eos_token_id=[2, 77])
    assert open_model(folder).spec.eos_token_ids == (2, 77)
    (folder / "generation_config.json").unlink()
    assert open_model(folder).spec.eos_token_ids == (2,)


@pytest.mark.parametrize("ids", [1.5, "abc", ["x"], [None], {"a": 1}, True, [-1]])
def test_end_tokens_that_are_no_ids_are_refused(folder: Path, ids: object) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=ids)
    refused(folder, InvalidModel, "generation_config.json", "eos_token_id")


def test_revision_is_of_content_and_not_of_place(folder: Path, pristine: Path) -> None:
    assert open_model(folder).revision == open_model(pristine).revision
    assert len(open_model(folder).revision) == 32


@pytest.mark.parametrize("change", ["weight", "config", "generation config", "other weights"])
def test_revision_changes_with(change: str, folder: Path, pristine: Path) -> None:
    if change == "weight":  # every value of one tensor; the last byte too
        edit_tensors(folder, **{KEY: load_file(folder / "model.safetensors")[KEY] + 0.5})
    if change == "config":
        edit_json(folder / "config.json", rms_norm_eps=1e-3)
    if change == "generation config":
        edit_json(folder / "generation_config.json", eos_token_id=4)
    if change == "other weights":
        make_llama(folder, Shape("untied", tie_word_embeddings=False), seed=1)
    assert open_model(folder).revision != open_model(pristine).revision


def refused(path: Path, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_model(path)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_refuses_what_is_no_model(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", InvalidModel, "nowhere", "does not exist")
    refused(tmp_path, InvalidModel, str(tmp_path), "no model folder", "config.json")
    (tmp_path / "file.bin").write_bytes(b"x")
    refused(tmp_path / "file.bin", InvalidModel, "file.bin", "neither a folder nor a .gguf file")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe{}", b""])
def test_refuses_a_broken_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, InvalidModel, "config.json")


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model_type": "mamba"}, UnsupportedModel, ["mamba", "llama"]),
        ({"model_type": None}, UnsupportedModel, ["None", "llama"]),
        ({"hidden_act": "gelu"}, UnsupportedModel, ["gelu"]),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedModel, ["dynamic", "yarn"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, InvalidModel, ["original_max_position_embeddings"]),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, UnsupportedModel, ["bitsandbytes", "gptq"]),
        ({"hidden_size": None}, InvalidModel, ["hidden_size"]),
        ({"hidden_size": "many"}, InvalidModel, ["many"]),
        ({"num_key_value_heads": 3}, InvalidModel, ["4 heads", "3 KV heads"]),
        ({"intermediate_size": 96}, InvalidModel, ["gate_proj", "88×48", "96×48", "model.safetensors"]),
    ],
)
def test_refuses_a_config_that_does_not_fit(
    folder: Path, changes: dict[str, Any], kind: type[Exception], words: list[str]
) -> None:
    edit_json(folder / "config.json", **changes)
    refused(folder, kind, *words)


def test_names_a_missing_tensor_and_a_wrong_shape(folder: Path) -> None:
    edit_tensors(folder, **{KEY: torch.zeros(25, 48)})
    refused(folder, InvalidModel, KEY, "25×48", "24×48", "model.safetensors")
    edit_tensors(folder, **{KEY: None})
    refused(folder, InvalidModel, KEY, "24×48", str(folder))


def test_names_a_tensor_of_a_type_it_does_not_read(folder: Path) -> None:
    edit_tensors(folder, **{KEY: torch.zeros(24, 48, dtype=torch.int8)})
    files = open_model(folder)
    with pytest.raises(UnsupportedModel, match=r"k_proj.*I8.*known are F32"):
        files.tensor(KEY)


def test_names_missing_weights_and_shards(folder: Path, sharded: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, InvalidModel, "model.safetensors", "model.safetensors.index.json")
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    refused(sharded, InvalidModel, victim.name, "lacks shard")


def test_refuses_an_index_without_a_map(sharded: Path) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map={})
    refused(sharded, InvalidModel, "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("kept", [0, 5, 200, 3000, -1])
def test_refuses_safetensors_cut_short(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(folder, InvalidModel, str(file), "cut short")


def test_a_file_that_is_cut_after_it_was_opened_is_an_error_and_no_crash(folder: Path) -> None:
    files, file = open_model(folder), folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(InvalidModel, match=r"model\.safetensors"):
        files.tensor(KEY)
