"""A Hugging Face folder: config.json, and safetensors in one file or in shards with their index."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.families import tensor_shapes
from engine.model_base import ModelFiles, update_with_sample
from engine.quantised_files import QuantisedTensors
from kernels.quantised import QuantisedWeight, dequantise
from spec.dtype import Dtype
from spec.errors import InvalidModel, UnsupportedModel
from spec.hf_config import model_from_hf
from spec.hf_values import token_ids
from spec.model import ModelSpec

_STORED_DTYPES = {"F32": Dtype.FLOAT32, "BF16": Dtype.BFLOAT16, "F16": Dtype.FLOAT16}


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    stored: Dtype | None  # None: a type that we do not read
    type_name: str


class HuggingFaceFolder(ModelFiles):
    def __init__(self, path: Path) -> None:
        self.path = path
        self._config_bytes, config = _read_json(path / "config.json", f"{path} is no model folder")
        self.spec = self._with_generation_config(model_from_hf(config))
        self._shards = _shards(path)
        self._entries: dict[str, _Entry] = {}
        for shard in self._shards:
            self._entries.update(_safetensors_entries(shard))
        # A model that sees images too holds its text part under a name of its own.
        self._stored_names = {_text_name(name): name for name in self._entries}
        self._entries = {name: self._entries[stored] for name, stored in self._stored_names.items()}
        self._quantised: QuantisedTensors | None = None
        self._quantised_shapes: dict[str, tuple[int, ...]] = {}
        if quantisation := config.get("quantization_config") or self._modelopt_config():
            self._quantised = QuantisedTensors(quantisation, self._entries, self._stored)
            self._quantised_shapes = self._quantised.shapes()
        embedding = self._entries.get(next(iter(tensor_shapes(self.spec))))
        if embedding is not None and embedding.stored is not None:
            self.spec = dataclasses.replace(self.spec, stored_dtype=embedding.stored)

    def _with_generation_config(self, spec: ModelSpec) -> ModelSpec:
        """Chat models often end turns with ids that only generation_config.json tells."""
        file = self.path / "generation_config.json"
        if not file.exists():
            return spec
        raw, generation = _read_json(file, f"{self.path} is damaged")
        self._config_bytes += raw
        try:
            more = token_ids(generation, "eos_token_id")
        except InvalidModel as error:
            raise InvalidModel(f"{file}: {error}", file=file) from None
        return dataclasses.replace(spec, eos_token_ids=tuple(dict.fromkeys((*spec.eos_token_ids, *more))))

    def _modelopt_config(self) -> object:
        """What older folders of ModelOpt say in a file of its own in the place of `quantization_config`."""
        file = self.path / "hf_quant_config.json"
        if not file.exists():
            return None
        raw, parsed = _read_json(file, f"{self.path} is damaged")
        self._config_bytes += raw
        quantisation = parsed.get("quantization")
        if not isinstance(quantisation, dict):
            raise InvalidModel(f"{file} has no object quantization", file=file)
        return {"quant_method": "modelopt", **quantisation} if quantisation.get("quant_algo") else None

    def check(self) -> None:
        if self._quantised is not None:
            for name in tensor_shapes(self.spec):
                self._quantised.check(name)
        super().check()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._entries) | frozenset(self._quantised_shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._quantised_shapes:
            return self._quantised_shapes[name]
        return self._entries[name].shape

    def file_of(self, name: str) -> Path:
        return self._entries[name].file if name in self._entries else self.path

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name in self._quantised_shapes and len(self._quantised_shapes[name]) == 3:
            experts = (self.quantised(name, expert) for expert in range(self._quantised_shapes[name][0]))
            stacked = torch.stack([dequantise(expert).T for expert in experts if expert is not None])
            return stacked if dtype is None else stacked.to(dtype)
        if (quantised := self.quantised(name)) is not None:
            return dequantise(quantised).to(dtype or torch.float32)
        entry = self._entries[name]
        if entry.stored is None:
            known = ", ".join(_STORED_DTYPES)
            raise UnsupportedModel(
                f"tensor {name} in {entry.file} is of type {entry.type_name}; known are {known}", tensor=name
            )
        tensor = self._stored(name)
        return tensor if dtype is None else tensor.to(dtype)

    def quantised(self, name: str, expert: int | None = None) -> QuantisedWeight | None:
        return None if self._quantised is None else self._quantised.weight(name, expert)

    def order(self, name: str) -> torch.Tensor | None:
        return None if self._quantised is None else self._quantised.order(name)

    def _stored(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        try:  # opened anew for each tensor: the mapping of a whole shard would stay resident beside the packed weights
            with safe_open(entry.file, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(self._stored_names[name])
        except (SafetensorError, OSError) as error:
            raise InvalidModel(f"{entry.file} cannot be read: {error}", file=entry.file, tensor=name) from None
        return tensor

    @cached_property
    def revision(self) -> str:
        digest = hashlib.blake2b(self._config_bytes, digest_size=16)
        for shard in self._shards:
            with shard.open("rb") as file:
                (header_bytes,) = struct.unpack("<Q", file.read(8))
            update_with_sample(digest, shard, 8 + header_bytes)
        return digest.hexdigest()


def _text_name(stored: str) -> str:
    """Of a tensor of the text part of a model that sees images too: without the part's name."""
    return stored.replace("model.language_model.", "model.").removeprefix("language_model.")


def _read_json(path: Path, context: str) -> tuple[bytes, dict[str, Any]]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidModel(f"{context}: {path.name} cannot be read ({error.strerror})", file=path) from None
    try:
        parsed = json.loads(raw)
    except ValueError as error:
        raise InvalidModel(f"{path} is no JSON: {error}", file=path) from None
    if not isinstance(parsed, dict):
        raise InvalidModel(f"{path} holds no JSON object", file=path)
    return raw, parsed


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of the folder, by name. Raises InvalidModel for one that the index names and is missing."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        if single.exists():
            return [single]
        raise InvalidModel(f"{folder} holds neither {single.name} nor {index.name}", file=single)
    weight_map: Mapping[str, str] = _read_json(index, f"{folder} is damaged")[1].get("weight_map", {})
    if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise InvalidModel(f"{index} has no weight_map of tensor names to file names", file=index)
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if not shard.exists():
            raise InvalidModel(f"{folder} lacks shard {shard.name}, which {index.name} names", file=shard)
    return shards


def _safetensors_entries(shard: Path) -> dict[str, _Entry]:
    try:
        with safe_open(shard, framework="pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = file.get_slice(name)
                kind = part.get_dtype()
                found[name] = _Entry(shard, tuple(part.get_shape()), _STORED_DTYPES.get(kind), kind)
            return found
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{shard} cannot be read, or is cut short: {error}", file=shard) from None
