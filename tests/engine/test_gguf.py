"""GGUF: names, row order, dequantization and every way in which a file can be wrong."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from stepper import Stepper, worst_difference
from tiny_gguf import write_gguf
from tiny_llama import SHAPES, Shape, load_reference, make_llama, reference_of

import engine.gguf_file
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from engine.rope import llama3_divisors
from spec.dtype import Dtype
from spec.errors import InvalidModel, UnsupportedModel
from spec.gguf import read_header
from spec.model import RopeSpec

SHAPE = Shape("gguf", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=8, intermediate_size=96)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_reference(make_llama(tmp_path_factory.mktemp("llama"), SHAPE))


@pytest.mark.parametrize(
    ("kind", "step"),
    [("F32", 0.0), ("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 1 / 127), ("Q4_1", 1 / 8), ("Q4_0", 1 / 7)],
)
def test_tensors_come_back_within_a_quantization_step(model: Any, tmp_path: Path, kind: str, step: float) -> None:
    files = open_model(write_gguf(tmp_path / "model.gguf", model, kind))
    expected = model.state_dict()
    assert files.names == set(expected) - {"lm_head.weight"}
    for name in files.names:
        found, original = files.tensor(name), expected[name]
        assert found.dtype is torch.float32
        bound = 0.0 if original.ndim == 1 else step * float(original.abs().max())
        assert float((found - original).abs().max()) <= bound, name


def test_metadata_becomes_the_spec(model: Any, tmp_path: Path) -> None:
    spec = open_model(write_gguf(tmp_path / "model.gguf", model, "Q8_0")).spec
    config = model.config
    assert (spec.family, spec.num_layers, spec.hidden_size) == ("llama", config.num_hidden_layers, config.hidden_size)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (8, 2, 8)
    assert (spec.vocab_size, spec.max_context_tokens, spec.rms_norm_eps) == (431, 512, config.rms_norm_eps)
    assert (spec.tie_embeddings, spec.bos_token_id, spec.eos_token_ids) == (True, 1, (2, 5))
    assert spec.stored_dtype is Dtype.BFLOAT16
    assert open_model(write_gguf(tmp_path / "32.gguf", model, "F32")).spec.stored_dtype is Dtype.FLOAT32


@pytest.mark.parametrize(
    "shape", [SHAPES[1], Shape("biases", attention_bias=True, mlp_bias=True)], ids=lambda s: s.name
)
def test_logits_are_those_of_the_model_it_was_made_from(shape: Shape, tmp_path: Path) -> None:
    original = load_reference(make_llama(tmp_path, shape))
    engine = Engine(open_model(write_gguf(tmp_path / "m.gguf", original)), EngineOptions(device="cpu"), 20)
    token_ids = list(range(3, 60))
    assert worst_difference(Stepper(engine).run(token_ids), reference_of(original, token_ids)) < 1e-4


def test_linear_scaling(tmp_path: Path) -> None:
    shape = SHAPES[4]
    original = load_reference(make_llama(tmp_path, shape))
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    engine = Engine(
        open_model(write_gguf(tmp_path / "m.gguf", original, metadata=scaling)), EngineOptions(device="cpu"), 20
    )
    token_ids = list(range(3, 60))
    assert worst_difference(Stepper(engine).run(token_ids), reference_of(original, token_ids)) < 1e-4


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_divisors_of_llama3_are_recognized(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setitem(model.config.rope_parameters, "rope_theta", 500000.0)
    rope = RopeSpec(500000.0, "llama3", factor, 1.0, 4.0, 8192)
    divisors = llama3_divisors(rope, SHAPE.head_dim).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": divisors})
    assert open_model(path).spec.ropes[0] == rope


def test_other_divisors_are_refused(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight"):
        open_model(path)


def q4_k_values(block: bytes) -> list[float]:
    """One block of 256, by the definition in ggml-quants.c, a value at a time."""
    scale, minimum = struct.unpack("<2e", block[:4])
    packed, nibbles, values = block[4:16], block[16:], []
    for j in range(8):
        if j < 4:
            s, m = packed[j] & 63, packed[j + 4] & 63
        else:
            s = (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)
            m = (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4)
        for i in range(32):
            byte = nibbles[32 * (j // 2) + i]
            values.append(scale * s * (byte >> 4 if j % 2 else byte & 15) - minimum * m)
    return values


def q6_k_values(block: bytes) -> list[float]:
    low, high, scales = block[:128], block[128:192], struct.unpack("<16b", block[192:208])
    (scale,) = struct.unpack("<e", block[208:])
    values = [0.0] * 256
    for n in range(2):
        for i in range(32):
            bits = high[32 * n + i]
            for quarter in range(4):
                byte = low[64 * n + 32 * (quarter % 2) + i]
                q = ((byte >> 4 if quarter >= 2 else byte & 15) | ((bits >> 2 * quarter & 3) << 4)) - 32
                values[128 * n + 32 * quarter + i] = scale * scales[8 * n + 2 * quarter + i // 16] * q
    return values


@pytest.mark.parametrize(("kind", "values_of"), [("Q4_K", q4_k_values), ("Q6_K", q6_k_values)])
def test_k_quants_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, values_of: Any) -> None:
    shape = Shape(
        "wide", hidden_size=256, num_attention_heads=4, head_dim=16, intermediate_size=256, num_hidden_layers=1
    )
    original = load_reference(make_llama(tmp_path, shape))
    path = write_gguf(tmp_path / "m.gguf", original, "F32")
    header = read_header(path)
    tensor = header.tensors["blk.0.ffn_gate.weight"]
    _, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (256, block_bytes), np.uint8)
    blocks[:, [208, 209] if kind == "Q6_K" else [0, 1, 2, 3]] = 17  # finite float16 scales
    raw = bytearray(path.read_bytes())
    raw[tensor.offset : tensor.offset + blocks.nbytes] = blocks.tobytes()
    name = b"blk.0.ffn_gate.weight"
    type_at = raw.index(name) + len(name) + 4 + 16
    raw[type_at : type_at + 4] = struct.pack("<I", GGMLQuantizationType[kind])
    path.write_bytes(raw)
    monkeypatch.setattr(engine.gguf_file, "SLICE_VALUES", 256 * 7)
    found = open_model(path).tensor("model.layers.0.mlp.gate_proj.weight")
    expected = np.array([values_of(block.tobytes()) for block in blocks])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-9)


def refused(path: Path, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        open_model(path)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def test_refuses_a_file_cut_anywhere(model: Any, tmp_path: Path) -> None:
    """Every prefix of the head that is no whole one, in steps, and several of the data."""
    path = write_gguf(tmp_path / "whole.gguf", model, "Q8_0")
    raw, cut = path.read_bytes(), tmp_path / "cut.gguf"
    data_offset = read_header(path).data_offset
    for kept in [0, 3, 4, 8, 20, *range(24, data_offset, 997), data_offset, data_offset + 100, len(raw) - 33]:
        cut.write_bytes(raw[:kept])
        refused(cut, InvalidModel, "cut.gguf")
    cut.write_bytes(raw[: len(raw) - 33])
    refused(cut, InvalidModel, "cut short", "tensor")


def test_refuses_what_is_no_gguf(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    raw = write_gguf(path, model, "Q8_0").read_bytes()
    for content, words in (
        (b"GGML" + raw[4:], ["no GGUF file"]),
        (raw[:4] + struct.pack("<I", 1) + raw[8:], ["version 1"]),
        (raw[:8] + struct.pack("<QQ", 2**60, 2**60) + raw[24:], ["m.gguf"]),
        (raw[:24] + struct.pack("<Q", 2**63) + raw[32:], ["cut short"]),
    ):
        path.write_bytes(content)
        refused(path, InvalidModel, *words)
    path.unlink()
    path.mkdir()
    refused(path, InvalidModel, "no model folder")


def test_refuses_what_no_row_knows(model: Any, tmp_path: Path) -> None:
    refused(write_gguf(tmp_path / "a.gguf", model, architecture="mamba"), UnsupportedModel, "mamba", "known are llama")
    refused(write_gguf(tmp_path / "b.gguf", model, "Q5_0"), UnsupportedModel, "Q5_0", "token_embd.weight", "Q4_K")
    yarn = {"llama.rope.scaling.type": "yarn"}
    refused(write_gguf(tmp_path / "c.gguf", model, metadata=yarn), UnsupportedModel, "yarn")
    refused(write_gguf(tmp_path / "d.gguf", model, metadata={"llama.expert_count": 8}), UnsupportedModel, "mixture")


def test_names_a_missing_tensor_and_a_wrong_shape(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight"))
    refused(path, InvalidModel, "model.layers.1.self_attn.k_proj.weight", "16×64")
    path.write_bytes(
        raw.replace(b"feed_forward_length\x04\x00\x00\x00\x60", b"feed_forward_length\x04\x00\x00\x00\x20")
    )
    refused(path, InvalidModel, "gate_proj", "96×64", "32×64", "m.gguf")


def test_revision(model: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", model, "Q8_0")
    first = open_model(path).revision
    renamed = path.rename(tmp_path / "other.gguf")
    assert open_model(renamed).revision == first
    raw = bytearray(renamed.read_bytes())
    raw[-1] ^= 1
    renamed.write_bytes(raw)
    assert open_model(renamed).revision != first
