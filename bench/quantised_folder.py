"""Checkpoint folders in the quantised formats of others, written from a plain folder by rounding to nearest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from bench import float_checkpoints, integer_checkpoints
from engine.model_files import open_model

_STACKED = ("experts.gate_up_proj", "experts.down_proj")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """config: the object `quantization_config`. pack: one weight to what is stored of it, and what that stands for."""

    config: dict[str, Any]
    pack: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
    stacked: bool = False  # the experts of gpt-oss alone


def compressed(layout: str, *, inputs: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    """The configuration of compressed-tensors. inputs: of activations, None where they are kept."""
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


def gptq(group: int, **options: Any) -> Checkpoint:
    config = {"quant_method": "gptq", "bits": options.get("bits", 4), "group_size": group}
    config |= {"desc_act": not options.get("in_order", True), "sym": options.get("symmetric", True)}
    return Checkpoint(config, partial(integer_checkpoints.gptq, group=group, **options))


def awq(group: int) -> Checkpoint:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Checkpoint(config, partial(integer_checkpoints.awq, group=group))


def block_fp8(block: int) -> Checkpoint:
    config = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    return Checkpoint(config, partial(float_checkpoints.block_fp8, block=block))


def compressed_block_fp8(block: int) -> Checkpoint:
    config = compressed("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[block, block])
    return Checkpoint(config, partial(float_checkpoints.block_fp8, block=block, scales_name="weight_scale"))


ROUNDED_ROWS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
FP8_CHANNELS = Checkpoint(
    compressed("float-quantized", inputs=ROUNDED_ROWS, num_bits=8, type="float", strategy="channel"),
    float_checkpoints.channel_fp8,
)
FP8_TENSOR = Checkpoint(
    compressed("float-quantized", num_bits=8, type="float", strategy="tensor"), float_checkpoints.tensor_fp8
)
MXFP4 = Checkpoint(
    compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    float_checkpoints.compressed_mxfp4,
)
GPT_OSS = Checkpoint({"quant_method": "mxfp4"}, float_checkpoints.stacked_mxfp4, stacked=True)
COMPRESSED_NVFP4 = Checkpoint(
    compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    float_checkpoints.compressed_nvfp4,
)
MODELOPT_NVFP4 = Checkpoint(
    {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}},
    float_checkpoints.modelopt_nvfp4,
)


def write_folder(plain: Path, target: Path, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Writes the Hugging Face folder `plain` with its projections quantised, embedding and head as they are. Returns
    the weights that it stands for, the quantised ones in float32. All of it lies in memory at once."""
    files = open_model(plain)
    stored: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name in sorted(files.names):
        tensor = files.tensor(name)
        if name.endswith(_STACKED if checkpoint.stacked else "_proj.weight"):
            parts, values[name] = checkpoint.pack(tensor)
            stem = name if checkpoint.stacked else name.removesuffix("weight")
            stored |= {stem + suffix: part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = values[name] = tensor
    target.mkdir(parents=True)
    save_file(stored, target / "model.safetensors", metadata={"format": "pt"})
    for file in plain.glob("*.json"):
        if file.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(file, target)
    settings = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    settings["quantization_config"] = checkpoint.config
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return values
