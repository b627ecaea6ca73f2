"""Checkpoints in the formats of others, written here from their published layouts, and what their weights are worth.

GPTQ as AutoGPTQ packs (qlinear_cuda `pack`), AWQ as AutoAWQ packs (gemm, `order_map`), FP8 as DeepSeek ships, NVFP4 as
compressed-tensors ships, MXFP4 as gpt-oss ships.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = dict[str, Tensor]  # suffix in the place of "weight" -> tensor
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def _affine(weight: Tensor, group: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes [N, K], zeros and scales [N, groups], and the values that they stand for."""
    n, k = weight.shape
    groups = weight.view(n, k // group, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-4).half().float()
    zeros = (-low / scales).round().clamp(1, 2**bits - 1)
    codes = (groups / scales[:, :, None] + zeros[:, :, None]).round().clamp(0, 2**bits - 1)
    values = (codes - zeros[:, :, None]) * scales[:, :, None]
    return codes.view(n, k).int(), zeros.int(), scales, values.view(n, k)


def _words(codes: Tensor, bits: int) -> Tensor:
    """[R, C] to [R, C · bits / 32] int32, the first code lowest."""
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int64) * bits
    words = (codes.view(codes.shape[0], -1, per_word).long() << shifts).sum(2)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def gptq(weight: Tensor, bits: int = 4, group: int = 8) -> tuple[Stored, Tensor]:
    codes, zeros, scales, values = _affine(weight, group, bits)
    stored = {
        "qweight": _words(codes, bits).T.contiguous(),
        "qzeros": _words(zeros.T.contiguous() - 1, bits),
        "scales": scales.T.contiguous().half(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
    }
    return stored, values


def awq(weight: Tensor, group: int = 8) -> tuple[Stored, Tensor]:
    codes, zeros, scales, values = _affine(weight, group, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(matrix: Tensor) -> Tensor:
        return _words(matrix.view(matrix.shape[0], -1, 8)[:, :, order].flatten(1), 4)

    stored = {
        "qweight": packed(codes.T.contiguous()),
        "qzeros": packed(zeros.T.contiguous()),
        "scales": scales.T.contiguous().half(),
    }
    return stored, values


def block_fp8(weight: Tensor, block: int = 8) -> tuple[Stored, Tensor]:
    n, k = weight.shape
    padded = torch.zeros(-(-n // block) * block, k)
    padded[:n] = weight
    tiles = padded.view(-1, block, k // block, block)
    scales = tiles.abs().amax((1, 3)) / 448.0
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (codes.float() * scales[:, None, :, None]).view(-1, k)[:n]
    return {"weight": codes.view(-1, k)[:n].contiguous(), "weight_scale_inv": scales}, values


def channel_fp8(weight: Tensor) -> tuple[Stored, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448.0
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def strategy_block_fp8(weight: Tensor) -> tuple[Stored, Tensor]:
    stored, values = block_fp8(weight, 16)
    return {"weight": stored["weight"], "weight_scale": stored["weight_scale_inv"]}, values


def nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    n, k = weight.shape
    divisor = torch.tensor([2688.0]) / weight.abs().max()  # 6 · 448 by the greatest
    groups = weight.view(n, -1, 16)
    scales = (groups.abs().amax(2) / 6.0 * divisor).to(torch.float8_e4m3fn)
    factors = (scales.float() / divisor)[:, :, None]
    codes = (groups[..., None] / factors[..., None] - FP4).abs().argmin(3).view(n, k).to(torch.uint8)
    values = FP4[codes.long()] * factors.expand(-1, -1, 16).reshape(n, k)
    stored = {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scales,
        "weight_global_scale": divisor,
    }
    return stored, values


def mxfp4(stacked: Tensor) -> tuple[Stored, Tensor]:
    """[E, in, out], as gpt-oss stacks them."""
    rows = stacked.transpose(1, 2)
    groups = rows.reshape(*rows.shape[:2], -1, 32)
    exponents = torch.floor(torch.log2(groups.abs().amax(3).clamp(min=1e-9))) - 2
    scaled = groups / torch.exp2(exponents)[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(4).to(torch.uint8)
    values = (FP4[codes.long()] * torch.exp2(exponents)[..., None]).view(rows.shape).transpose(1, 2).contiguous()
    return {"_blocks": codes[..., ::2] | codes[..., 1::2] << 4, "_scales": (exponents + 127).to(torch.uint8)}, values


METHODS: dict[str, tuple[dict[str, Any], Callable[[Tensor], tuple[Stored, Tensor]]]] = {
    "gptq-int4": ({"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}, gptq),
    "gptq-int8": ({"quant_method": "gptq", "bits": 8, "group_size": 8}, lambda weight: gptq(weight, bits=8)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}, awq),
    "fp8-blocks": ({"quant_method": "fp8", "weight_block_size": [8, 8]}, block_fp8),
    "fp8-channels": ({"quant_method": "compressed-tensors", "format": "float-quantized"}, channel_fp8),
    "fp8-strategy-block": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"strategy": "block", "block_structure": [16, 16]}}},
        },
        strategy_block_fp8,
    ),
    "nvfp4": ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, nvfp4),
}


def quantise_folder(plain: Path, quantised: Path, method: str) -> dict[str, Tensor]:
    """Writes `plain` with its projections quantised; returns the weights that it stands for."""
    config, pack = METHODS[method] if method != "mxfp4" else ({"quant_method": "mxfp4"}, mxfp4)
    tensors, values = load_file(plain / "model.safetensors"), {}
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        values[name] = tensor
        if method == "mxfp4" and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parts, values[name] = pack(tensor)
            stored |= {name + suffix: part.contiguous() for suffix, part in parts.items()}
        elif method != "mxfp4" and name.endswith("_proj.weight"):
            parts, values[name] = pack(tensor)
            stem = name.removesuffix("weight")
            stored |= {stem + suffix: part.contiguous() for suffix, part in parts.items()}
        else:
            stored[name] = tensor
    quantised.mkdir(parents=True)
    save_file(stored, quantised / "model.safetensors")
    settings = json.loads((plain / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return values
