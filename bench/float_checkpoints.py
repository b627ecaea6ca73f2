"""Weights as FP8 and FP4 checkpoints hold them, rounded to nearest: `pack(weight [N, K])` gives the tensors that are
stored, by suffix in the place of "weight", and the values [N, K] float32 that they stand for.

FP8 blocks as DeepSeek ships them, or compressed-tensors (another name of the scales), which has a scale per output or
per tensor too. MXFP4 as gpt-oss stacks experts, or compressed-tensors packs a matrix. NVFP4 as compressed-tensors has
it (divided by a scale of the tensor), or ModelOpt (multiplied by one).
"""

from __future__ import annotations

import torch
from torch import Tensor

Stored = dict[str, Tensor]
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_E2M1_BOUNDS = (_E2M1[1:] + _E2M1[:-1]) / 2
_LARGEST_E4M3, _LARGEST_E2M1 = 448.0, 6.0


def block_fp8(weight: Tensor, *, block: int, scales_name: str = "weight_scale_inv") -> tuple[Stored, Tensor]:
    """Blocks at the edges may be cut short."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % block, 0, -n % block))
    tiles = padded.view(padded.shape[0] // block, block, -1, block)
    scales = _scales_of(tiles.abs().amax((1, 3)))
    codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    values = (codes.float() * scales[:, None, :, None]).view_as(padded)[:n, :k].contiguous()
    return {"weight": codes.view_as(padded)[:n, :k].contiguous(), scales_name: scales}, values


def channel_fp8(weight: Tensor) -> tuple[Stored, Tensor]:
    return _scaled_fp8(weight, _scales_of(weight.float().abs().amax(1, keepdim=True)))


def tensor_fp8(weight: Tensor) -> tuple[Stored, Tensor]:
    return _scaled_fp8(weight, _scales_of(weight.float().abs().amax().view(1)))


def _scaled_fp8(weight: Tensor, scales: Tensor) -> tuple[Stored, Tensor]:
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def _scales_of(greatest: Tensor) -> Tensor:
    return torch.where(greatest == 0, 1.0, greatest / _LARGEST_E4M3)


def compressed_nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    packed, scales, factor, values = _nvfp4(weight)
    return {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": (1.0 / factor).view(1)}, values


def modelopt_nvfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    packed, scales, factor, values = _nvfp4(weight)
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": factor, "input_scale": torch.ones(())}, values


def _nvfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """codes, E4M3 scales [N, K / 16], the scale of the tensor, and the values that they stand for."""
    groups = weight.float().view(weight.shape[0], -1, 16)
    factor = groups.abs().amax() / (_LARGEST_E2M1 * _LARGEST_E4M3)
    scales = (groups.abs().amax(2) / (_LARGEST_E2M1 * factor)).clamp(min=2.0**-9).to(torch.float8_e4m3fn)
    packed, values = _fp4(groups, scales.float() * factor)
    return packed, scales, factor, values


def compressed_mxfp4(weight: Tensor) -> tuple[Stored, Tensor]:
    packed, exponents, values = _mxfp4(weight)
    return {"weight_packed": packed, "weight_scale": exponents}, values


def stacked_mxfp4(stacked: Tensor) -> tuple[Stored, Tensor]:
    """[E, in, out], as gpt-oss stacks its experts; the suffixes are added to the name."""
    num_experts, num_inputs, num_outputs = stacked.shape
    packed, exponents, values = _mxfp4(stacked.transpose(1, 2).reshape(-1, num_inputs))
    stored = {
        "_blocks": packed.view(num_experts, num_outputs, -1, 16),
        "_scales": exponents.view(num_experts, num_outputs, -1),
    }
    return stored, values.view(num_experts, num_outputs, num_inputs).transpose(1, 2).contiguous()


def _mxfp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """codes, scales [N, K / 32] in E8M0, and the values that they stand for. As compressed-tensors has it, a scale is
    the greatest magnitude's power of two, or the next one from 1.75 on, by 4."""
    groups = weight.float().view(weight.shape[0], -1, 32)
    greatest = groups.abs().amax(2).clamp(min=2.0**-100)
    exponents = torch.floor(torch.log2(greatest)) - 2
    exponents += greatest >= 7.0 * torch.exp2(exponents)
    packed, values = _fp4(groups, torch.exp2(exponents))
    return packed, (exponents + 127).to(torch.uint8), values


def _fp4(groups: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """groups [N, G, size], scales [N, G]: codes [N, G · size / 2] uint8, an even k in the low half, and the values."""
    scaled = (groups / scales[:, :, None]).contiguous()
    low, high = (torch.bucketize(scaled.abs(), _E2M1_BOUNDS, right=right) for right in (False, True))
    magnitudes = torch.where(high % 2 == 0, high, low)  # they differ halfway between two
    values = _E2M1[magnitudes].copysign(scaled) * scales[:, :, None]
    codes = (magnitudes + 8 * torch.signbit(scaled)).to(torch.uint8).flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, values.flatten(1)
