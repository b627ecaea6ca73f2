"""The GGUF file that llama.cpp is given: transformers reads the folder's weights out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader
from tiny_gguf import write_gguf as write_original
from tiny_llama import Shape, load_reference, make_llama
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from bench.gguf_writer import write_gguf
from engine.convert import convert_gguf


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_finds_the_same_weights(tmp_path: Path, tied: bool) -> None:
    shape = Shape(
        "small", hidden_size=64, intermediate_size=96, num_key_value_heads=2, head_dim=16, tie_word_embeddings=tied
    )
    model = load_reference(make_llama(tmp_path / "source", shape))
    original = write_original(tmp_path / "original.gguf", model, "Q4_1", metadata={"general.name": "tiny"})
    convert_gguf(original, tmp_path / "folder")
    expected = load_reference(tmp_path / "folder").state_dict()
    for kind, tolerance in (("BF16", 0.0), ("Q8_0", 0.005)):
        target = tmp_path / f"{kind}.gguf"
        write_gguf(tmp_path / "folder", original, target, kind)
        found = load_gguf_checkpoint(str(target), return_tensors=True, model_to_load=model)["tensors"]
        assert found.keys() == expected.keys() - ({"lm_head.weight"} if tied else set())
        for name, values in found.items():
            limit = tolerance * expected[name].abs().max()
            assert (values.float() - expected[name].float()).abs().max() <= limit, name
        metadata = {key: field.contents() for key, field in GGUFReader(target).fields.items()}
        kept = {key: field.contents() for key, field in GGUFReader(original).fields.items()}
        assert metadata.pop("general.file_type") == {"BF16": 32, "Q8_0": 7}[kind]
        assert metadata.pop("general.quantization_version") == 2
        for counts in (metadata, kept):
            del counts["GGUF.tensor_count"], counts["GGUF.kv_count"]
        assert metadata == kept
