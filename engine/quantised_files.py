"""Quantised weights as checkpoints store them, brought into the one form of kernels/quantised.py without a loss.

GPTQ                  qweight int32 [K · bits / 32, N], qzeros int32 [groups, N · bits / 32], scales [groups, N],
                      g_idx [K], the group of each input; a stored zero point is one too low ("gptq"), or as it is
                      ("gptq_v2")
AWQ                   qweight int32 [K, N / 8], qzeros int32 [groups, N / 8], scales [groups, N]; the eight columns
                      of a word in the order 0 2 4 6 1 3 5 7
FP8                   weight E4M3 [N, K], weight_scale_inv (DeepSeek) or weight_scale (compressed-tensors): [1],
                      [N, 1], or one per block, [N / 128, K / 128] where the configuration names no other block
MXFP4                 blocks uint8 [E, N, K / 32, 16], scales uint8 [E, N, K / 32], E8M0 (gpt-oss)
                      or weight_packed uint8 [N, K / 2], weight_scale uint8 [N, K / 32] (compressed-tensors)
NVFP4                 weight_packed uint8 [N, K / 2], weight_scale E4M3 [N, K / 16], weight_global_scale [1], by
                      which is divided (compressed-tensors); or weight, weight_scale, weight_scale_2 (), by which is
                      multiplied (ModelOpt)
GGUF Q4_0 Q4_1 Q8_0   blocks of 32: a float16 scale (and minimum), then codes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.quantised_heads import (
    Heads,
    check_fp8,
    check_grouped,
    check_mxfp4,
    check_packed_fp4,
    fp8_block,
    fp8_grid,
    global_scale,
    group_inputs,
    is_fp8,
    packed_fp4,
    rounds_rows,
)
from kernels.quantised import Activations, Kind, QuantisedWeight, nibbles, ordered
from spec.errors import InvalidModel, UnsupportedModel

METHODS = ("gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "modelopt")
COMPRESSED_FORMATS = ("float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
MODELOPT_ALGORITHMS = ("FP8", "NVFP4", "W4A16_NVFP4")
_AWQ_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # where the columns of a word lie in it


class QuantisedTensors:
    """Finds and reads the quantised weights of a Hugging Face folder; `read(name)` gives a tensor as it is stored.

    config: the object `quantization_config`. Raises UnsupportedModel for a method or option that is not known,
    InvalidModel for a value that does not fit."""

    def __init__(self, config: object, heads: Heads, read: Callable[[str], Tensor]) -> None:
        if not isinstance(config, Mapping):
            raise InvalidModel(f"config.json: quantization_config must be an object, is {config!r}")
        self._config, self._heads, self._read = config, heads, read
        method = config.get("quant_method")
        if method not in METHODS:
            raise UnsupportedModel(f"quant_method {method!r} is not known; known are {', '.join(METHODS)}")
        bits = config.get("bits") or config.get("w_bit") or 4
        if method == "gptq" and bits not in (4, 8):
            raise UnsupportedModel(f"GPTQ of {bits} bits is not known; 4 and 8 are")
        if method == "awq" and (bits != 4 or str(config.get("version", "gemm")).lower() != "gemm"):
            raise UnsupportedModel("of AWQ, 4 bits in the form 'gemm' are known")
        self._bits = 8 if bits == 8 else 4
        self._method = str(method)
        layout = config.get("format")
        if method == "compressed-tensors" and layout not in COMPRESSED_FORMATS:
            known = ", ".join(COMPRESSED_FORMATS)
            raise UnsupportedModel(f"compressed-tensors of the form {layout!r} is not known; known are {known}")
        algorithm = config.get("quant_algo")
        if method == "modelopt" and algorithm not in MODELOPT_ALGORITHMS:
            known = ", ".join(MODELOPT_ALGORITHMS)
            raise UnsupportedModel(f"ModelOpt's {algorithm!r} is not known; known are {known}")
        self._fp4_group = 32 if layout == "mxfp4-pack-quantized" else 16
        self._group_size = config.get("group_size", config.get("q_group_size"))
        self._block = fp8_block(config)
        self._activations: Activations = "fp8" if rounds_rows(config) else "kept"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names that the weights would have, were they not quantised, and their shapes. Where a weight is only scaled,
        its name is in the files as well."""
        found = {}
        for name in self._heads:
            stem, shape = self._stem_of(name), self._whole_shape(name)
            if stem is not None and shape is not None:
                found[stem] = shape
        return found

    def check(self, name: str) -> None:
        """Raises InvalidModel naming the first tensor of those that the weight `name` is of which is missing, or of
        another shape or type than it must have; nothing is read."""
        heads, stem = self._heads, name.removesuffix(".weight")
        if self._method in ("gptq", "awq") and f"{stem}.qweight" in heads:
            packed_inputs = self._method == "gptq"
            check_grouped(heads, stem, self._bits, packed_inputs=packed_inputs, group_size=self._group_size)
        elif self._method == "mxfp4" and f"{name}_blocks" in heads:
            check_mxfp4(heads, name)
        elif (codes := packed_fp4(heads, stem)) is not None:
            check_packed_fp4(heads, stem, codes, self._fp4_group)
        elif (scales := self._fp8_scales(stem)) is not None or is_fp8(heads, name):
            check_fp8(heads, name, scales, self._block)

    def weight(self, name: str, expert: int | None = None) -> QuantisedWeight | None:
        """The weight that would be `name` ("...q_proj.weight"), or one expert of a stacked one; None: it is not
        quantised."""
        stem = name.removesuffix(".weight")
        if self._method == "gptq" and f"{stem}.qweight" in self._heads:
            return self._gptq(stem)
        if self._method == "awq" and f"{stem}.qweight" in self._heads:
            return self._awq(stem)
        if self._method == "mxfp4" and f"{name}_blocks" in self._heads:
            assert expert is not None
            return mxfp4(self._read(f"{name}_blocks")[expert], self._read(f"{name}_scales")[expert])
        if (codes := packed_fp4(self._heads, stem)) is not None:
            return self._packed_fp4(stem, codes)
        scales = self._fp8_scales(stem)
        return None if scales is None else self._fp8(name, scales)

    def order(self, name: str) -> Tensor | None:
        """[K] int64: the inputs of the weight `name`, those of one scale together; None: they are so as they lie."""
        stem = name.removesuffix(".weight")
        if self._method != "gptq" or f"{stem}.g_idx" not in self._heads:
            return None
        group_of, group = self._grouping(stem)
        return None if _is_in_order(group_of, group) else group_of.argsort(stable=True)

    # ---- names and shapes --------------------------------------------------------------------------------------------

    def _stem_of(self, name: str) -> str | None:
        """The plain name of the weight whose codes `name` holds."""
        for suffix, plain in ((".qweight", ".weight"), ("_blocks", ""), (".weight_packed", ".weight")):
            if name.endswith(suffix):
                return name.removesuffix(suffix) + plain
        return name if packed_fp4(self._heads, name.removesuffix(".weight")) == name else None

    def _whole_shape(self, name: str) -> tuple[int, ...] | None:
        """None: no codes have such a shape."""
        shape = self._heads[name].shape
        if name.endswith("_blocks"):
            return (shape[0], shape[2] * shape[3] * 2, shape[1]) if len(shape) == 4 else None
        if len(shape) != 2:
            return None
        if name.endswith((".weight_packed", ".weight")):
            return shape[0], shape[1] * 2
        if self._method == "awq":
            return shape[1] * 8, shape[0]
        return shape[1], shape[0] * (32 // self._bits)

    def _fp8_scales(self, stem: str) -> str | None:
        names = (f"{stem}.weight_scale_inv", f"{stem}.weight_scale")
        return next((name for name in names if name in self._heads), None)

    # ---- methods -----------------------------------------------------------------------------------------------------

    def _grouping(self, stem: str) -> tuple[Tensor, int]:
        """The group of each input, [K] int64, and the size of a group."""
        num_inputs = self._heads[f"{stem}.qweight"].shape[0] * (32 // self._bits)
        group = group_inputs(self._heads, stem, num_inputs, self._group_size)
        if f"{stem}.g_idx" not in self._heads:
            return torch.arange(num_inputs) // group, group
        group_of = self._read(f"{stem}.g_idx").long()
        if int(group_of.min()) < 0 or int(group_of.max()) >= self._heads[f"{stem}.scales"].shape[0]:
            raise InvalidModel(f"{stem}.g_idx names groups that are not there", tensor=f"{stem}.g_idx")
        return group_of, group

    def _gptq(self, stem: str) -> QuantisedWeight:
        scales = self._read(f"{stem}.scales")
        group_of, group = self._grouping(stem)
        add = 0 if self._config.get("checkpoint_format") == "gptq_v2" else 1
        codes = unpacked(self._read(f"{stem}.qweight"), self._bits, 0).T.contiguous()
        zeros = unpacked(self._read(f"{stem}.qzeros"), self._bits, 1) + add
        return _from_codes(codes, scales, zeros, self._bits, group, group_of)

    def _awq(self, stem: str) -> QuantisedWeight:
        scales = self._read(f"{stem}.scales")
        codes, zeros = (self._awq_columns(f"{stem}.{part}") for part in ("qweight", "qzeros"))
        group = group_inputs(self._heads, stem, codes.shape[0], self._group_size)
        return _from_codes(codes.T.contiguous(), scales, zeros, 4, group)

    def _awq_columns(self, name: str) -> Tensor:
        """[R, C / 8] words to [R, C] codes."""
        words = unpacked(self._read(name), 4, 1)
        return words.view(words.shape[0], -1, 8)[:, :, list(_AWQ_COLUMN)].flatten(1)

    def _packed_fp4(self, stem: str, name: str) -> QuantisedWeight:
        codes, scales = self._read(name), self._read(f"{stem}.weight_scale")
        if self._fp4_group == 32:
            return mxfp4(codes.view(codes.shape[0], -1, 16), scales.view(torch.uint8))
        whole = global_scale(name)
        factor = self._read(whole).float().reshape(1)
        if not 0.0 < float(factor) < float("inf"):
            raise InvalidModel(f"tensor {whole} is {float(factor)}, expected a number above 0", tensor=whole)
        factor = 1.0 / factor if whole.endswith("weight_global_scale") else factor
        each = factor.expand(codes.shape[0]).contiguous()
        return QuantisedWeight("fp4", codes, scales, codes.shape[1] * 2, 16, output_scales=each)

    def _fp8(self, name: str, scales_name: str) -> QuantisedWeight:
        codes, scales = self._read(name), self._read(scales_name)
        in_blocks = scales.shape == fp8_grid(codes.shape, self._block)
        weight = block_fp8(codes, scales, self._block) if in_blocks else scaled_fp8(codes, scales)
        return dataclasses.replace(weight, activations=self._activations)


def unpacked(words: Tensor, bits: int, dimension: int) -> Tensor:
    """int32 words of codes, lowest bits first, to one code each along `dimension`: int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    shifts = shifts.view(-1, *[1] * (words.dim() - 1 - dimension))
    codes: Tensor = (words.unsqueeze(dimension + 1) >> shifts) & (2**bits - 1)
    return codes.flatten(dimension, dimension + 1)


def _from_codes(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, group_of: Tensor | None = None
) -> QuantisedWeight:
    """codes [N, K], scales and zeros [groups, N]: value = scale · (code - zero). group_of [K]: where any inputs may
    share a scale."""
    kind: Kind = "int8" if bits == 8 else "int4"
    middle = 2 ** (bits - 1)
    offsets = (scales.float() * (middle - zeros)).T.contiguous()
    scales = scales.T.contiguous()
    codes = (codes - middle).to(torch.int8) if bits == 8 else codes.to(torch.uint8)
    inputs = torch.arange(codes.shape[1])
    if group_of is not None and not _is_in_order(group_of, group):
        return ordered(kind, codes, group_of, inputs, scales, offsets)
    codes = codes if bits == 8 else nibbles(codes)
    return QuantisedWeight(kind, codes, scales, inputs.numel(), group, offsets)


def _is_in_order(group_of: Tensor, group: int) -> bool:
    return torch.equal(group_of, torch.arange(group_of.numel()) // group)


def block_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> QuantisedWeight:
    """Raises InvalidModel where the blocks do not cover the weight."""
    outputs, inputs = codes.shape
    if scales.shape != fp8_grid(codes.shape, block):
        raise InvalidModel(f"scales {tuple(scales.shape)} are not those of blocks {block} of {tuple(codes.shape)}")
    each = scales.float().repeat_interleave(block[0], dim=0)[:outputs].contiguous()
    return QuantisedWeight("fp8", codes, each, inputs, block[1])


def scaled_fp8(codes: Tensor, scales: Tensor) -> QuantisedWeight:
    outputs, inputs = codes.shape
    return QuantisedWeight("fp8", codes, scales.float().reshape(-1, 1).expand(outputs, 1).contiguous(), inputs, inputs)


def mxfp4(blocks: Tensor, scales: Tensor) -> QuantisedWeight:
    """blocks uint8 [N, K / 32, 16], scales uint8 [N, K / 32], the exponent and 127."""
    return QuantisedWeight(
        "fp4", blocks.flatten(1).contiguous(), scales.contiguous().view(torch.float8_e8m0fnu), blocks.shape[1] * 32, 32
    )


def gguf_blocks(raw: Tensor, kind: str) -> QuantisedWeight:
    """raw uint8 [N, K / 32, bytes of a block] of Q4_0, Q4_1 or Q8_0."""
    scales = _half(raw, 0)
    inputs = raw.shape[1] * 32
    if kind == "Q8_0":
        return QuantisedWeight("int8", raw[:, :, 2:].flatten(1).contiguous().view(torch.int8), scales, inputs, 32)
    first = 2 if kind == "Q4_0" else 4
    halves = raw[:, :, first:]  # element i beside element i + 16
    codes = nibbles(torch.cat((halves & 15, halves >> 4), dim=2).flatten(1))
    offsets = None if kind == "Q4_0" else _half(raw, 2).float() + 8.0 * scales.float()
    return QuantisedWeight("int4", codes, scales, inputs, 32, offsets)


def _half(raw: Tensor, at: int) -> Tensor:
    return raw[:, :, at : at + 2].contiguous().view(torch.float16).squeeze(2)
