"""What launches compile to for GPUs that need not be here, and what the assembler says of it.

Launchers choose tiles, specialisations and warps. A recorder stands where their kernels were, and what would have been
launched is compiled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource
from triton.runtime.jit import native_specialize_impl

from kernels import (
    fp8_linear,
    gated_activation,
    grouped_fp8_linear,
    grouped_linear,
    grouped_quantised_linear,
    kv_pack,
    moe_mlp,
    moe_route,
    paged_attention_gpu,
    quantised_linear,
    rms_norm,
    rope_kv_write,
    sampling,
    tuning,
)
from kernels.tuned_shapes import SHAPES
from kernels.tuning import SHARED_BYTES, Config

TARGETS = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a"}
KERNELS: dict[str, tuple[ModuleType, str]] = {  # the one that an operation's table is of
    "fp8_linear": (fp8_linear, "_kernel"),
    "fp8_quantise": (fp8_linear, "_quantise_kernel"),
    "gated_activation": (gated_activation, "_kernel"),
    "grouped_fp8_linear": (grouped_fp8_linear, "_kernel"),
    "grouped_linear": (grouped_linear, "_kernel"),
    "grouped_quantised_linear": (grouped_quantised_linear, "_kernel"),
    "kv_pack": (kv_pack, "_kernel"),
    "moe_combine": (moe_mlp, "_combine_kernel"),
    "moe_route": (moe_route, "_kernel"),
    "paged_attention": (paged_attention_gpu, "_attend_kernel"),
    "paged_attention_join": (paged_attention_gpu, "_join_kernel"),
    "quantised_linear": (quantised_linear, "_kernel"),
    "rms_norm": (rms_norm, "_kernel"),
    "rope_kv_write": (rope_kv_write, "_kernel"),
    "sampling": (sampling, "_kernel"),
}
LEAST_CAPABILITY = {
    "fp8_linear": 89,
    "grouped_fp8_linear": 89,
}  # where sm_80, whose tables serve 89 too, has no product


def capability_of(operation: str, architecture: int) -> int:
    """Of the lowest device that launches it with the tables of an architecture."""
    return max(architecture, LEAST_CAPABILITY.get(operation, architecture))


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    operation: str
    architecture: int
    config: Config
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    shared_bytes: int  # of a block
    ptx_target: str
    cubin_bytes: int

    @property
    def fault(self) -> str | None:
        """Why it may not be launched."""
        most = SHARED_BYTES[self.architecture]
        if self.spilled_bytes:
            return f"spills {self.spilled_bytes} bytes"
        return f"takes {self.shared_bytes} bytes of shared memory, of {most}" if self.shared_bytes > most else None


@dataclasses.dataclass(frozen=True)
class Launch:
    """Two that are equal compile to the same code."""

    operation: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int], Any], ...]
    attributes: tuple[tuple[tuple[int], str], ...]
    config: Config = dataclasses.field(compare=False)
    options: tuple[tuple[str, int], ...]


def _launch(operation: str, kernel: Any, arguments: tuple[Any, ...], options: dict[str, int]) -> Launch:
    """As JITFunction specialises it: a tensor or integer that 16 divides, and the integer 1."""
    signature, constants, attributes = [], [], []
    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        kind, key = "constexpr", None
        if not parameter.is_constexpr:
            kind, key = native_specialize_impl(CUDABackend, value, False, not parameter.do_not_specialize, True)
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append(((index,), value))
        elif key is not None:
            attributes.append(((index,), key))
    tiles = {name: value for (name, _), value in zip(signature, arguments, strict=True) if name.isupper()}
    config = Config({name: tiles[name] for name in tiles if "TILE" in name or name == "BLOCK"}, **options)
    return Launch(operation, tuple(signature), tuple(constants), tuple(attributes), config, tuple(options.items()))


class _Recorder:
    def __init__(self, operation: str, kernel: Any, launches: list[Launch]) -> None:
        self._operation, self._kernel, self._launches = operation, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        assert all(size > 0 for size in grid)
        return lambda *arguments, **options: self._launches.append(
            _launch(self._operation, self._kernel, arguments, options)
        )


@contextlib.contextmanager
def _recorded_in(launches: list[Launch]) -> Iterator[None]:
    kernels = {operation: getattr(*place) for operation, place in KERNELS.items()}
    has_products = fp8_linear.has_products
    try:
        fp8_linear.has_products = lambda device: True
        for operation, (module, name) in KERNELS.items():
            setattr(module, name, _Recorder(operation, kernels[operation], launches))
        yield
    finally:
        fp8_linear.has_products = has_products
        for operation, (module, name) in KERNELS.items():
            setattr(module, name, kernels[operation])


@dataclasses.dataclass(frozen=True, slots=True)
class Recording:
    launches: tuple[Launch, ...]
    rows: frozenset[tuple[str, int]]  # operation and index of the row of its table, wherever one was asked for


def record(shape: str, architecture: int, config: Config | None = None) -> Recording:
    """What a shape of tuned_shapes.py launches on an architecture; its operation with `config`, where it is given."""
    launches: list[Launch] = []
    rows = set()

    def choose(operation: str, numbers: tuning.Shape) -> Config:
        table = tuning.table(operation, architecture)
        index = table.index(numbers)
        rows.add((operation, index))
        return config if config and operation == SHAPES[shape].operation else table.rows[index].config

    with tuning.choosing(choose), _recorded_in(launches):
        SHAPES[shape].make(torch.device("cpu")).launch()
    return Recording(tuple(dict.fromkeys(launches)), frozenset(rows))


@functools.cache
def compile_launch(launch: Launch, architecture: int) -> Usage:
    """Raises what the compiler raises. The assembler's report is only made where it runs, so nothing comes from
    Triton's cache on disk."""
    source = ASTSource(
        getattr(*KERNELS[launch.operation]),
        dict(launch.signature),
        dict(launch.constants),
        {place: CUDABackend.parse_attr(key) for place, key in launch.attributes},
    )
    report, capability = io.StringIO(), capability_of(launch.operation, architecture)
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(report):
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    registers, spilled = (
        int(re.findall(pattern, report.getvalue())[0]) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill st")
    )
    target = re.findall(r"\.target (\w+)", compiled.asm["ptx"])[0]
    shared, size = compiled.metadata.shared, len(compiled.asm["cubin"])
    return Usage(launch.operation, architecture, launch.config, registers, spilled, shared, target, size)


def compile_shape(shape: str, architecture: int) -> list[Usage]:
    return [compile_launch(launch, architecture) for launch in record(shape, architecture).launches]


def line_of(shape: str, usage: Usage) -> str:
    tiles = " ".join(f"{name.lower()}={value}" for name, value in usage.config.tiles.items())
    return (
        f"{shape:52} {usage.operation:20} {usage.ptx_target:7} {usage.registers:4} registers "
        f"{usage.spilled_bytes:4} spilled {usage.shared_bytes:7} shared   "
        f"{tiles} warps={usage.config.num_warps} stages={usage.config.num_stages}"
    )


def fault_of(shape: str, architecture: int, config: Config) -> str | None:
    """Why a shape's operation may not be launched so."""
    try:
        launches = record(shape, architecture, config).launches
        own = [launch for launch in launches if launch.operation == SHAPES[shape].operation]
        faults = [compile_launch(launch, architecture).fault for launch in own]
    except Exception as error:  # a tile that the kernel or the compiler cannot do
        return f"does not compile: {type(error).__name__}"
    return next(filter(None, faults), None)
