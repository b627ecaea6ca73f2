"""A GGUF file as a source of tensors: Hugging Face names, rows in Hugging Face order, dequantized as they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from engine.model_base import ModelFiles, update_with_sample
from engine.quantised_files import gguf_blocks
from engine.rope import llama3_divisors
from kernels.quantised import QuantisedWeight
from spec.dtype import Dtype
from spec.errors import InvalidModel, UnsupportedModel
from spec.gguf import GgufTensor, read_header
from spec.gguf_config import model_from_gguf
from spec.model import RopeSpec

_READABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")
TYPES = {GGMLQuantizationType[name].value: GGMLQuantizationType[name] for name in _READABLE}
SLICE_VALUES = 1 << 22  # dequantized at once, as float32: 16 MiB

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_DIVISORS = "rope_freqs.weight"


class GgufFile(ModelFiles):
    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self._data_offset, self._by_gguf_name = header.data_offset, header.tensors
        self.spec = model_from_gguf(header.metadata, header.tensors)
        self._tensors = {_hf_name(name): tensor for name, tensor in header.tensors.items() if name != ROPE_DIVISORS}
        for tensor in header.tensors.values():
            self._check_data(tensor)
        self.spec = dataclasses.replace(self.spec, stored_dtype=self._stored_dtype(), ropes=(self._rope(),))

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def file_of(self, name: str) -> Path:
        return self.path

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = self._dequantized(self._tensors[name], dtype or torch.float32)
        if ".q_proj." in name:
            return _hf_rows(values, self.spec.num_heads)
        if ".k_proj." in name:
            return _hf_rows(values, self.spec.num_kv_heads)
        return values

    def quantised(self, name: str, expert: int | None = None) -> QuantisedWeight | None:
        tensor = self._tensors[name]
        kind = TYPES[tensor.type_id]
        if kind.name not in ("Q4_0", "Q4_1", "Q8_0"):
            return None
        _, block_bytes = GGML_QUANT_SIZES[kind]
        raw = torch.from_numpy(self._raw(tensor)).view(tensor.shape[0], -1, block_bytes)
        weight = gguf_blocks(raw, kind.name)
        for part, num_heads in ((".q_proj.", self.spec.num_heads), (".k_proj.", self.spec.num_kv_heads)):
            if part in name:
                return weight[_hf_rows(torch.arange(weight.n), num_heads)]
        return weight

    def _raw(self, tensor: GgufTensor) -> NDArray[np.uint8]:
        num_bytes = _data_bytes(tensor, TYPES[tensor.type_id])
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            raw = np.fromfile(file, dtype=np.uint8, count=num_bytes)
        if raw.size != num_bytes:
            raise InvalidModel(f"{self.path} was cut short while tensor {tensor.name} was read", file=self.path)
        return raw

    @cached_property
    def revision(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        update_with_sample(digest, self.path, self._data_offset)
        return digest.hexdigest()

    def _check_data(self, tensor: GgufTensor) -> None:
        kind = _kind(tensor, self.path)
        block_values, _ = GGML_QUANT_SIZES[kind]
        if not tensor.shape or tensor.shape[-1] % block_values:
            raise InvalidModel(
                f"tensor {tensor.name} in {self.path} has shape {tensor.shape}, not whole blocks of {kind.name}",
                file=self.path,
                tensor=tensor.name,
            )
        end, size = tensor.offset + _data_bytes(tensor, kind), self.path.stat().st_size
        if end > size:
            raise InvalidModel(
                f"{self.path} is cut short: tensor {tensor.name} ends at byte {end}, the file has {size}",
                file=self.path,
                tensor=tensor.name,
            )

    def _stored_dtype(self) -> Dtype:
        embedding = self._tensors.get("model.embed_tokens.weight")
        kind = TYPES[embedding.type_id].name if embedding is not None else "BF16"
        return {"F32": Dtype.FLOAT32, "F16": Dtype.FLOAT16}.get(kind, Dtype.BFLOAT16)

    def _rope(self) -> RopeSpec:
        """GGUF keeps the scaling of Llama 3.1 and later as one divisor per frequency; the rule that made them is found
        again, since a folder written from this file has to name it. Raises UnsupportedModel for any other divisors."""
        rope, tensor = self.spec.ropes[0], self._by_gguf_name.get(ROPE_DIVISORS)
        if tensor is None:
            return rope
        divisors = self._dequantized(tensor, torch.float64).numpy()
        found = RopeSpec(rope.theta, "llama3", float(divisors.max()), 1.0, 4.0, 8192)
        expected = llama3_divisors(found, self.spec.head_dim)
        if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
            raise UnsupportedModel(
                f"{ROPE_DIVISORS} in {self.path} does not follow the rule of Llama 3", tensor=ROPE_DIVISORS
            )
        return found

    def _dequantized(self, tensor: GgufTensor, dtype: torch.dtype) -> torch.Tensor:
        """In slices of rows, so that the float32 form of a large tensor never exists as a whole. Read, not mapped:
        pages of a mapping would stay resident beside the packed weights."""
        kind = TYPES[tensor.type_id]
        block_values, block_bytes = GGML_QUANT_SIZES[kind]
        columns = tensor.shape[-1]
        num_rows, row_bytes = math.prod(tensor.shape[:-1]), columns // block_values * block_bytes
        out = torch.empty(num_rows, columns, dtype=dtype)
        rows_at_once = max(1, SLICE_VALUES // columns)
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            for start in range(0, num_rows, rows_at_once):
                count = min(rows_at_once, num_rows - start)
                raw = np.fromfile(file, dtype=np.uint8, count=count * row_bytes)
                if raw.size != count * row_bytes:
                    raise InvalidModel(f"{self.path} was cut short while tensor {tensor.name} was read", file=self.path)
                values = dequantize(raw.reshape(count, row_bytes), kind)
                out[start : start + count] = torch.from_numpy(values.reshape(count, columns))
        return out.reshape(tensor.shape)


def _hf_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; a name no row knows stays as it is."""
    stem, _, ending = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{ending}"
    parts = stem.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{ending}"
    return name


def _hf_rows(values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undoes the permutation of query and key rows: GGUF pairs rotated dimensions (2i, 2i+1), Hugging Face (i, i+h)."""
    pairs = values.reshape(num_heads, -1, 2, *values.shape[1:])
    return pairs.transpose(1, 2).reshape(values.shape)


def _kind(tensor: GgufTensor, path: Path) -> GGMLQuantizationType:
    if tensor.type_id in TYPES:
        return TYPES[tensor.type_id]
    known = ", ".join(kind.name for kind in TYPES.values())
    try:
        found = GGMLQuantizationType(tensor.type_id).name
    except ValueError:
        found = f"number {tensor.type_id}"
    raise UnsupportedModel(f"tensor {tensor.name} in {path} is of type {found}; known are {known}", tensor=tensor.name)


def _data_bytes(tensor: GgufTensor, kind: GGMLQuantizationType) -> int:
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(tensor.shape) // block_values * block_bytes
