"""LoRA adapters from disk, as PEFT writes them: adapter_config.json and adapter_model.safetensors.

An adapter belongs to one base model and changes some of its attention and MLP projections. It is cut among ranks as the
weights are: where a weight's rows are cut, B's rows are; where its columns are, A's columns are.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.families import FAMILIES, Family, Weight, sizes_of
from engine.projection import LowRank
from engine.sharding import Cutter
from kernels.linear import pack
from spec.errors import InvalidModel, UnsupportedModel
from spec.model import ModelSpec

_REFUSED = {  # key of adapter_config.json -> the one value of a plain adapter
    "peft_type": "LORA",
    "use_dora": False,
    "alora_invocation_tokens": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
}
_DTYPES = ("F64", "F32", "F16", "BF16")


class AdapterFiles:
    """One adapter. Raises InvalidModel for files that are missing, damaged or of another model's shapes, and
    UnsupportedModel for what is no plain LoRA of projections that the base model has."""

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        self.path, self._spec = path, spec
        config = _read_config(path)
        for key, allowed in _REFUSED.items():
            if config.get(key, allowed) not in (allowed, [] if allowed is None else allowed):
                raise UnsupportedModel(f"{path} is a LoRA with {key} {config[key]!r}; only {allowed!r} is known")
        if config.get("rank_pattern") or config.get("alpha_pattern"):
            raise UnsupportedModel(f"{path} has ranks of its own for single layers; one rank for all is known")
        if spec.latent is not None:
            raise UnsupportedModel(f"adapters are not known to family {spec.family}, which has latent attention")
        rank, alpha = config["r"], config["lora_alpha"]
        self.rank, self.scale = rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        self._file = path / "adapter_model.safetensors"
        self._shapes = _shapes(self._file)
        self._check()

    @cached_property
    def revision(self) -> str:
        """32 hex digits over all bytes: adapters are small, and two that differ in one weight differ."""
        digest = hashlib.blake2b((self.path / "adapter_config.json").read_bytes(), digest_size=16)
        with self._file.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return digest.hexdigest()

    def low_rank(
        self, weights: Sequence[Weight], layer: int, cutter: Cutter, dtype: torch.dtype, device: torch.device
    ) -> LowRank | None:
        """For weights that are fused into one projection; None where the adapter leaves all of them alone."""
        pairs = [self._pair(weight, layer, cutter) for weight in weights]
        if not any(pair is not None for pair in pairs):
            return None
        downs = [pair[0] for pair in pairs if pair is not None]
        ups = torch.zeros(sum(_rows(weight, cutter, self._spec) for weight in weights), sum(map(len, downs)))
        row = column = 0
        for weight, pair in zip(weights, pairs, strict=True):
            if pair is not None:
                ups[row : row + pair[1].shape[0], column : column + self.rank] = pair[1]
                column += self.rank
            row += _rows(weight, cutter, self._spec)
        return LowRank(
            pack(torch.cat(downs).to(device, dtype)),
            pack((ups * self.scale).to(device, dtype).contiguous()),
        )

    def _pair(self, weight: Weight, layer: int, cutter: Cutter) -> tuple[Tensor, Tensor] | None:
        stem = _stem(weight, layer)
        if f"{stem}.lora_A.weight" not in self._shapes:
            return None
        with safe_open(self._file, framework="pt") as file:
            down, up = (file.get_tensor(f"{stem}.lora_{part}.weight").float() for part in "AB")
        return cutter.cut(down, ("rank", weight.shape[1])), cutter.cut(up, (weight.shape[0], "rank"))

    def _check(self) -> None:
        sizes, expected = sizes_of(self._spec), {}
        for layer, weight in _adaptable(FAMILIES[self._spec.family], self._spec):
            rows = sum(sizes[part] for part in weight.shape[0].split("+"))
            stem = _stem(weight, layer)
            expected[f"{stem}.lora_A.weight"] = (self.rank, sizes[weight.shape[1]])
            expected[f"{stem}.lora_B.weight"] = (rows, self.rank)
        for name, shape in self._shapes.items():
            if name not in expected:
                raise UnsupportedModel(f"{self._file} changes {name}, which is no projection that adapters may change")
            if shape != expected[name]:
                raise InvalidModel(f"tensor {name} in {self._file} has shape {shape}, expected {expected[name]}")
            if _other_half(name) not in self._shapes:
                raise InvalidModel(f"{self._file} lacks {_other_half(name)}")
        if not self._shapes:
            raise InvalidModel(f"{self._file} is empty")


def _adaptable(family: Family, spec: ModelSpec) -> Iterator[tuple[int, Weight]]:
    for layer, described in enumerate(spec.layers):
        mlp = () if described.is_moe else (*family.gate_up, family.down)
        for weight in (*family.qkv, family.output, *mlp):
            yield layer, weight


def _rows(weight: Weight, cutter: Cutter, spec: ModelSpec) -> int:
    """Of the weight's output, what the rank holds."""
    sizes, ranges = sizes_of(spec), cutter.ranges(weight.shape[0])
    return sum(sizes[part] for part in weight.shape[0].split("+")) if ranges is None else sum(map(len, ranges))


def _stem(weight: Weight, layer: int) -> str:
    return f"base_model.model.{weight.name.format(layer=layer)}"


def _other_half(name: str) -> str:
    return name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json"
    try:
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        rank, alpha = config["r"], config["lora_alpha"]
        if type(rank) is not int or rank < 1:
            raise ValueError(f"r must be a whole number above 0, is {rank!r}")
        if type(alpha) not in (int, float) or not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"lora_alpha must be a finite number above 0, is {alpha!r}")
        float(rank)
    except OSError as error:
        raise InvalidModel(f"{path} is no adapter: {file.name} cannot be read ({error.strerror})", file=file) from None
    except KeyError as error:
        raise InvalidModel(f"{file} does not fit: it has no {error}", file=file) from None
    except (ValueError, OverflowError) as error:
        raise InvalidModel(f"{file} does not fit: {error}", file=file) from None
    return config


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Of tensors that are all of finite numbers."""
    found = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                described = opened.get_slice(name)
                if described.get_dtype() not in _DTYPES:
                    raise UnsupportedModel(f"tensor {name} in {file} is {described.get_dtype()}; known are {_DTYPES}")
                if not opened.get_tensor(name).isfinite().all():
                    raise InvalidModel(f"tensor {name} in {file} holds numbers that are not finite", file=file)
                found[name] = tuple(described.get_shape())
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{file} cannot be read, or is cut short: {error}", file=file) from None
    return found
