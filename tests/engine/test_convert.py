"""`convert_gguf`: a folder that transformers loads, with the same logits as ours; whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from stepper import Stepper, worst_difference
from tiny_gguf import write_gguf
from tiny_llama import SHAPES, Shape, load_reference, make_llama, reference_of

from engine.convert import convert_gguf, hf_config
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration, InvalidModel
from spec.hf_config import model_from_hf
from spec.model import RopeSpec

TOKENS = list(range(3, 60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shape = Shape("small", hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=False)
    return load_reference(make_llama(tmp_path_factory.mktemp("llama"), shape))


@pytest.fixture
def quantized(model: Any, tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "model.gguf", model, "Q4_1")


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(Dtype.FLOAT32, 1e-4), (Dtype.BFLOAT16, 0.2), (Dtype.FLOAT16, 0.02)], ids=str
)
def test_transformers_and_we_agree_on_the_folder(
    quantized: Path, tmp_path: Path, dtype: Dtype, tolerance: float
) -> None:
    heard: list[float] = []
    convert_gguf(quantized, tmp_path / "out", heard.append, dtype=dtype)
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    oracle = load_reference(tmp_path / "out")
    expected = reference_of(oracle, TOKENS)
    folder = Engine(open_model(tmp_path / "out"), EngineOptions(dtype="float32", device="cpu"), 20)
    assert worst_difference(Stepper(folder).run(TOKENS), expected) < 1e-4
    source = Engine(open_model(quantized), EngineOptions(dtype="float32", device="cpu"), 20)
    assert worst_difference(Stepper(source).run(TOKENS), expected) < tolerance
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {f"torch.{dtype.value}"}  # noqa: SIM118


def test_shards(quantized: Path, tmp_path: Path) -> None:
    convert_gguf(quantized, tmp_path / "one", dtype=Dtype.FLOAT32)
    convert_gguf(quantized, tmp_path / "many", dtype=Dtype.FLOAT32, shard_bytes=60_000)
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    one, many = load_reference(tmp_path / "one").state_dict(), load_reference(tmp_path / "many").state_dict()
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, many[name])
    assert open_model(tmp_path / "many").names == open_model(tmp_path / "one").names


def test_files_can_be_read_by_others(quantized: Path, tmp_path: Path) -> None:
    convert_gguf(quantized, tmp_path / "out")
    for path in (tmp_path / "out", *(tmp_path / "out").iterdir()):
        assert path.stat().st_mode & stat.S_IROTH, path


def test_the_tokenizer_is_its_callers(quantized: Path, tmp_path: Path) -> None:
    convert_gguf(quantized, tmp_path / "out", write_tokenizer=lambda folder: (folder / "tokenizer.json").touch())
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_whole_or_not_at_all(quantized: Path, tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        raise RuntimeError("no tokenizer")

    with pytest.raises(RuntimeError):
        convert_gguf(quantized, tmp_path / "out", write_tokenizer=fails)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_targets(quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for target in (tmp_path / "full", quantized, quantized / "below"):
        with pytest.raises(InvalidConfiguration, match=target.name):
            convert_gguf(quantized, target)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    convert_gguf(quantized, tmp_path / "empty")
    convert_gguf(quantized, tmp_path / "a" / "b")
    with pytest.raises(InvalidModel, match=r"no \.gguf file"):
        convert_gguf(tmp_path / "empty", tmp_path / "again")


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_configuration_is_read_back(shape: Shape, tmp_path: Path) -> None:
    spec = open_model(make_llama(tmp_path, shape)).spec
    assert model_from_hf(hf_config(spec, Dtype.FLOAT32)).ropes[0] == spec.ropes[0]
    assert isinstance(spec.ropes[0], RopeSpec)
    back = model_from_hf(hf_config(spec, Dtype.FLOAT32))
    assert back.kv_layout(16, Dtype.FLOAT32) == spec.kv_layout(16, Dtype.FLOAT32)
    assert (back.eos_token_ids, back.tie_embeddings, back.rms_norm_eps) == (
        spec.eos_token_ids,
        spec.tie_embeddings,
        spec.rms_norm_eps,
    )
