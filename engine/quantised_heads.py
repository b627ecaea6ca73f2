"""What the heads of a folder's files must say of a quantised weight's tensors, before any of them is read.

Every check takes the tensors by name and raises InvalidModel naming the one that is missing, or of another shape or
type than its method has it; UnsupportedModel for groups that kernels do not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from kernels.quantised import GROUP_MULTIPLE
from spec.errors import InvalidModel, UnsupportedModel

_FLOATS = ("F32", "F16", "BF16")
_CODES_FP8, _EXPONENTS = "F8_E4M3", "F8_E8M0"


class Head(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def type_name(self) -> str:
        """As safetensors has it."""


Heads = Mapping[str, Head]


def check_grouped(heads: Heads, stem: str, bits: int, *, packed_inputs: bool, group_size: object) -> None:
    """GPTQ (`packed_inputs`: a word holds codes of one output) and AWQ (of one input). group_size: see group_inputs."""
    per_word = 32 // bits
    rows, columns = _sizes(heads, f"{stem}.qweight", 2, "I32")
    inputs, outputs = (rows * per_word, columns) if packed_inputs else (rows, columns * per_word)
    group = group_inputs(heads, stem, inputs, group_size)
    if group < inputs and group % GROUP_MULTIPLE:
        raise UnsupportedModel(f"{stem}: groups of {group}; known are multiples of {GROUP_MULTIPLE}")
    groups = -(-inputs // group)
    _expect(heads, f"{stem}.scales", (groups, outputs), *_FLOATS)
    _expect(heads, f"{stem}.qzeros", (groups, -(-outputs // per_word)), "I32")
    if packed_inputs and f"{stem}.g_idx" in heads:
        _expect(heads, f"{stem}.g_idx", (inputs,), "I32", "I64")


def group_inputs(heads: Heads, stem: str, inputs: int, group_size: object) -> int:
    """Inputs that share a scale; the last group may have fewer. group_size: as the configuration has it, -1 for one
    group, None where it does not say: as many equal ones as there are scales."""
    if group_size is None:
        groups = _sizes(heads, f"{stem}.scales", 2, *_FLOATS)[0]
        if inputs % groups:
            raise InvalidModel(f"{stem}: {inputs} inputs are no {groups} equal groups", tensor=f"{stem}.scales")
        return inputs // groups
    if type(group_size) is not int or group_size == 0 or group_size < -1:
        raise InvalidModel(f"group_size must be a whole number above 0, or -1, is {group_size!r}")
    return inputs if group_size == -1 else min(group_size, inputs)


def check_mxfp4(heads: Heads, name: str) -> None:
    experts, outputs, groups, _ = _sizes(heads, f"{name}_blocks", 4, "U8")
    _expect(heads, f"{name}_blocks", (experts, outputs, groups, 16), "U8")
    _expect(heads, f"{name}_scales", (experts, outputs, groups), "U8")


def packed_fp4(heads: Heads, stem: str) -> str | None:
    """The tensor that holds two codes a byte: compressed-tensors names it for that, ModelOpt as a plain weight."""
    if f"{stem}.weight_packed" in heads:
        return f"{stem}.weight_packed"
    plain = heads.get(f"{stem}.weight")
    return None if plain is None or plain.type_name != "U8" else f"{stem}.weight"


def check_packed_fp4(heads: Heads, stem: str, codes: str, group: int) -> None:
    """`codes`: what packed_fp4 found. `group`: 16, NVFP4, with a scale of the tensor, or 32, MXFP4."""
    outputs, half = _sizes(heads, codes, 2, "U8")
    if half * 2 % group:
        raise InvalidModel(f"tensor {codes} has {half * 2} columns, which are no whole groups of {group}", tensor=codes)
    scales = f"{stem}.weight_scale"
    _expect(heads, scales, (outputs, half * 2 // group), *((_CODES_FP8,) if group == 16 else ("U8", _EXPONENTS)))
    if group == 16:
        whole = global_scale(codes)
        if _of_type(heads, whole, _FLOATS).shape not in ((), (1,)):
            raise InvalidModel(f"tensor {whole} has shape {heads[whole].shape}, expected one number", tensor=whole)


def global_scale(codes: str) -> str:
    """Of NVFP4, beside such codes: what compressed-tensors divides by, or ModelOpt multiplies by."""
    stem, _, suffix = codes.rpartition(".")
    return f"{stem}.weight_global_scale" if suffix == "weight_packed" else f"{stem}.weight_scale_2"


def is_fp8(heads: Heads, name: str) -> bool:
    return name in heads and heads[name].type_name == _CODES_FP8


def check_fp8(heads: Heads, name: str, scales_name: str | None, block: tuple[int, int]) -> None:
    """`block`: rows and columns that share a scale, where there is one per block."""
    if scales_name is None:
        raise InvalidModel(f"tensor {name} is FP8 and has no weight_scale", tensor=name)
    outputs, inputs = _sizes(heads, name, 2, _CODES_FP8)
    scales = heads[scales_name]
    if scales.type_name not in (*_FLOATS, _EXPONENTS):
        raise InvalidModel(f"tensor {scales_name} is of type {scales.type_name}, expected floats", tensor=scales_name)
    one = all(size == 1 for size in scales.shape)
    if not one and scales.shape not in ((outputs,), (outputs, 1), fp8_grid((outputs, inputs), block)):
        raise InvalidModel(
            f"{scales_name} {scales.shape} is neither one scale, nor one per output, nor one per block {block} of "
            f"{(outputs, inputs)}",
            tensor=scales_name,
        )


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share a scale of FP8: DeepSeek has one key for it, compressed-tensors a group of weights.

    Raises InvalidModel where it is no two whole numbers, UnsupportedModel for columns that kernels do not group."""
    block = config.get("weight_block_size")
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping) and weights.get("strategy") == "block":
            block = weights.get("block_structure")
    if block is None:
        return 128, 128
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise InvalidModel(f"a block of FP8 must be two whole numbers above 0, is {block!r}")
    if block[1] % GROUP_MULTIPLE:
        raise UnsupportedModel(f"a block of FP8 must have a multiple of {GROUP_MULTIPLE} columns, has {block[1]}")
    return block[0], block[1]


def rounds_rows(config: Mapping[str, Any]) -> bool:
    """Whether a weight of FP8 is meant to multiply rows that are rounded to FP8 as they come: DeepSeek's scheme
    "dynamic", or dynamic activations of compressed-tensors. Scales that were found beforehand ("static") are not used.
    """
    groups = config.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, Mapping) else []
    inputs = [group.get("input_activations") if isinstance(group, Mapping) else None for group in groups]
    wanted = {"dynamic": True, "type": "float", "num_bits": 8}
    dynamic = [isinstance(each, Mapping) and wanted.items() <= each.items() for each in inputs]
    return config.get("activation_scheme") == "dynamic" or (bool(dynamic) and all(dynamic))


def fp8_grid(shape: Sequence[int], block: tuple[int, int]) -> tuple[int, int]:
    """Blocks of a weight [N, K] along its two sides."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _sizes(heads: Heads, name: str, num_dimensions: int, *types: str) -> tuple[int, ...]:
    head = _of_type(heads, name, types)
    if len(head.shape) != num_dimensions or 0 in head.shape:
        raise InvalidModel(f"tensor {name} has shape {head.shape}, expected {num_dimensions} dimensions", tensor=name)
    return head.shape


def _expect(heads: Heads, name: str, shape: tuple[int, ...], *types: str) -> None:
    head = _of_type(heads, name, types)
    if head.shape != shape:
        raise InvalidModel(f"tensor {name} has shape {head.shape}, expected {shape}", tensor=name)


def _of_type(heads: Heads, name: str, types: tuple[str, ...]) -> Head:
    head = heads.get(name)
    if head is None:
        raise InvalidModel(f"tensor {name} is missing, which belongs to a quantised weight", tensor=name)
    if head.type_name not in types:
        raise InvalidModel(f"tensor {name} is of type {head.type_name}, expected {' or '.join(types)}", tensor=name)
    return head
