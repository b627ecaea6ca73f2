"""Small checkpoints in the formats of others, in groups that small weights have several of."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from bench.quantised_folder import (
    COMPRESSED_NVFP4,
    FP8_CHANNELS,
    FP8_TENSOR,
    GPT_OSS,
    MODELOPT_NVFP4,
    MXFP4,
    awq,
    block_fp8,
    compressed_block_fp8,
    gptq,
    write_folder,
)

METHODS = {
    "gptq-int4": gptq(8, symmetric=False),
    "gptq-int4-symmetric": gptq(24),  # the last group is short
    "gptq-int4-order": gptq(16, symmetric=False, in_order=False),
    "gptq-int8-order": gptq(24, bits=8, in_order=False),
    "gptq-int8": gptq(8, bits=8, symmetric=False),
    "awq": awq(8),
    "fp8-blocks": block_fp8(8),
    "fp8-channels": FP8_CHANNELS,
    "fp8-tensor": FP8_TENSOR,
    "fp8-strategy-block": compressed_block_fp8(40),  # those at the edges are cut short
    "mxfp4-compressed": MXFP4,
    "nvfp4": COMPRESSED_NVFP4,
    "nvfp4-modelopt": MODELOPT_NVFP4,
}


def quantise_folder(plain: Path, quantised: Path, method: str) -> dict[str, Tensor]:
    """Writes `plain` with its projections quantised; returns the weights that it stands for."""
    return write_folder(plain, quantised, GPT_OSS if method == "mxfp4" else METHODS[method])
