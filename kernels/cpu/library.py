"""The compiled kernels as Python calls them: tensors in, tensors out, a few microseconds a call.

Every tensor is on the CPU and contiguous unless its line says otherwise. The launchers of kernels/*.py have checked
shapes and dtypes; what is checked here is what would make C++ read or write out of bounds.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.cpu.build import BuildFailed, build, default_cache, recipe
from kernels.kv_rows import row_dims
from kernels.quantised import GROUP_MULTIPLE, QuantisedWeight

_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_KV_SUFFIX = {**_SUFFIX, torch.int8: "int8", torch.float8_e4m3fn: "fp8"}  # the last two row-quantised
NO_WINDOW = 1 << 31  # more than any position
ACTIVATIONS = ("silu", "gelu_tanh", "swiglu_clamped")  # in the order of activation.h
_SCORINGS = ("softmax", "softmax_chosen", "sigmoid")  # in the order of moe_route.cpp
_CODES = ("int8", "fp8", "int4", "fp4")  # in the order of quantised.h, as are the dtypes of factors
_FACTORS = (None, torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu, torch.float8_e4m3fn)
_P, _N, _F, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_double
_I, _B = ctypes.c_int, ctypes.c_bool

_QUANTISED = torch.uint8  # of panels: bytes that say themselves what they hold
_LINEAR = {  # (x, panels, result)
    (torch.bfloat16, torch.bfloat16, torch.bfloat16): "bf16",
    (torch.bfloat16, torch.bfloat16, torch.float32): "wide_bf16",
    (torch.float32, torch.float32, torch.float32): "fp32",
    (torch.bfloat16, _QUANTISED, torch.bfloat16): "quantised_bf16",
    (torch.bfloat16, _QUANTISED, torch.float32): "quantised_wide_bf16",
    (torch.float32, _QUANTISED, torch.float32): "quantised_fp32",
}
_EMBEDDING = {  # (panels, result)
    (torch.bfloat16, torch.bfloat16): "bf16",
    (torch.float32, torch.float32): "fp32",
    (_QUANTISED, torch.bfloat16): "quantised_bf16",
    (_QUANTISED, torch.float32): "quantised_fp32",
}


class _QuantisedHeader(ctypes.Structure):
    """quantised.h's Header: what the packed form says of itself."""

    _fields_: ClassVar = [
        ("num_outputs", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("codes", ctypes.c_int32),
        ("scales", ctypes.c_int32),
        ("offsets", ctypes.c_int32),
        ("output_scales", ctypes.c_int32),
        ("unused", ctypes.c_uint8 * 24),
    ]


class Library:
    """One compiled library. Functions are looked up by the dtypes that they were compiled for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = ctypes.CDLL(str(path))
        self._pack = self._by_dtype("pack", _P, _P, _N, _N, _I)
        self._pack_quantised = self._function("pack_quantised", *[_P] * 6, _I)
        self._quantised_bytes = self._function("quantised_bytes", _P, result=_N)
        self._linear = {
            (x, panels, out): self._function(f"linear_{name}", _P, _P, _P, _P, _N, _N, _N, _I)
            for (x, panels, out), name in _LINEAR.items()
        }
        self._head_linear = self._by_dtype("head_linear", *[_P] * 3, *[_N] * 8, _I)
        self._embedding = {
            (panels, out): self._function(f"embedding_{name}", _P, _P, _P, _N, _N, _N, result=_B)
            for (panels, out), name in _EMBEDDING.items()
        }
        self._rms_norm = self._by_dtype("rms_norm", _P, _P, _P, _P, _P, _N, _N, _F, _F, _I)
        self._gated_activation = self._by_dtype("gated_activation", _P, _P, _N, _N, _I, _I)
        self._ordered_columns = self._by_dtype("ordered_columns", _P, _P, _P, _N, _N, _N, _I)
        self._rope_kv_write = self._by_two_dtypes(
            "rope_kv_write", *[_P] * 10, *[_N] * 10, _F, _F, _I, others=_KV_SUFFIX
        )
        self._attention = self._by_two_dtypes("paged_attention", *[_P] * 8, *[_N] * 11, _F, _F, _I, others=_KV_SUFFIX)
        self._moe_route = self._function("moe_route", *[_P] * 4, *[_N] * 5, _I, _B, _B, _F, _I)
        self._moe_mlp = self._by_dtype("moe_mlp", *[_P] * 5, *[_N] * 5, _I, _B, _B, _I, result=_B)
        self._sample = self._function("sample", *[_P] * 7, _N, _N, _N, _I)
        self._masses = self._function("masses", _P, _D, _D, _P, _N)
        self._packed_elements = self._function("packed_elements", _N, _N, _I, result=_N)
        self.panel_columns: int = self._function("panel_columns", result=_I)()
        self.operation_bytes = self._function("operation_bytes", result=_N)
        self.run_program = self._function("run_program", _P, _N, _P, _P, _I)
        self._read = self._function("read_bytes", _P, _N, _I, result=ctypes.c_uint64)

    def _function(self, name: str, *arguments: Any, result: Any = None) -> Any:
        function = getattr(self._handle, f"legato_{name}")
        function.argtypes, function.restype = arguments, result
        return function

    def _by_dtype(self, name: str, *arguments: Any, result: Any = None) -> dict[torch.dtype, Any]:
        return {
            dtype: self._function(f"{name}_{suffix}", *arguments, result=result) for dtype, suffix in _SUFFIX.items()
        }

    def _by_two_dtypes(
        self, name: str, *arguments: Any, others: dict[torch.dtype, str] = _SUFFIX
    ) -> dict[tuple[torch.dtype, torch.dtype], Any]:
        return {
            (one, other): self._function(f"{name}_{_SUFFIX[one]}_{others[other]}", *arguments)
            for one in _SUFFIX
            for other in others
        }

    def pack(self, weight: Tensor) -> Tensor:
        """[N, K] -> the panels, a new tensor of one dimension (a little more than N · K elements)."""
        num_outputs, depth = weight.shape
        weight = weight.contiguous()
        panels = weight.new_empty(self._packed_elements(num_outputs, depth, weight.element_size()))
        self._pack[weight.dtype](weight.data_ptr(), panels.data_ptr(), num_outputs, depth, torch.get_num_threads())
        return panels

    def pack_quantised(self, weight: QuantisedWeight) -> Tensor:
        """The panels, a new tensor of bytes. They serve bfloat16 and float32 alike."""
        codes, scales, offsets, output_scales = (None if t is None else t.contiguous() for t in weight.tensors())
        assert codes is not None
        assert scales is not None
        group = -(-min(weight.group, weight.k) // GROUP_MULTIPLE) * GROUP_MULTIPLE
        factors = [_FACTORS.index(None if t is None else t.dtype) for t in (scales, offsets, output_scales)]
        header = _QuantisedHeader(weight.n, weight.k, group, _CODES.index(weight.kind), *factors)
        panels = torch.empty(self._quantised_bytes(ctypes.byref(header)), dtype=_QUANTISED)
        sources = [None if t is None else t.data_ptr() for t in (codes, scales, offsets, output_scales)]
        self._pack_quantised(ctypes.byref(header), *sources, panels.data_ptr(), torch.get_num_threads())
        return panels

    def unpack(self, panels: Tensor, num_outputs: int, depth: int) -> Tensor:
        """The inverse of `pack`, and of `pack_quantised` in float32: [N, K], a new tensor."""
        if panels.dtype == _QUANTISED:
            return self.embedding(torch.arange(num_outputs), panels, num_outputs, depth, torch.float32)
        step = 2 if panels.element_size() == 2 else 1
        steps = -(-depth // step)
        columns = panels.view(-1, steps, self.panel_columns, step).transpose(1, 2)
        return columns.reshape(-1, steps * step)[:num_outputs, :depth].contiguous()

    def linear(self, x: Tensor, panels: Tensor, bias: Tensor | None, num_outputs: int, *, wide: bool = False) -> Tensor:
        """x: [T, K]; bias: [N], in x.dtype. Returns [T, N] in x.dtype, or in float32 where `wide`."""
        num_rows, depth = x.shape
        x = x.contiguous()
        out = x.new_empty(num_rows, num_outputs, dtype=torch.float32 if wide else x.dtype)
        self._linear[x.dtype, panels.dtype, out.dtype](
            x.data_ptr(),
            panels.data_ptr(),
            None if bias is None else bias.data_ptr(),
            out.data_ptr(),
            num_rows,
            num_outputs,
            depth,
            torch.get_num_threads(),
        )
        return out

    def head_linear(self, x: Tensor, panels: Tensor, out: Tensor) -> None:
        """x: [T, H, K]; panels: [H, those of a weight [N, K]]; out: [T, H, N], written; of one dtype. Of x and out only
        the last dimension need be contiguous."""
        num_rows, num_heads, depth = x.shape
        num_outputs = out.shape[2]
        assert out.shape[:2] == x.shape[:2]
        assert x.dtype == panels.dtype == out.dtype
        assert x.stride(2) == out.stride(2) == 1
        assert panels.is_contiguous()
        assert panels.shape == (num_heads, self._packed_elements(num_outputs, depth, x.element_size()))
        self._head_linear[x.dtype](
            x.data_ptr(),
            panels.data_ptr(),
            out.data_ptr(),
            num_rows,
            num_heads,
            num_outputs,
            depth,
            *x.stride()[:2],
            *out.stride()[:2],
            torch.get_num_threads(),
        )

    def embedding(self, token_ids: Tensor, panels: Tensor, num_outputs: int, depth: int, dtype: torch.dtype) -> Tensor:
        """token_ids: [T] int64. Returns [T, K] in `dtype`: that of the panels, or any where they are quantised."""
        assert token_ids.dtype == torch.int64
        token_ids = token_ids.contiguous()
        out = panels.new_empty(token_ids.shape[0], depth, dtype=dtype)
        inside = self._embedding[panels.dtype, dtype](
            token_ids.data_ptr(), panels.data_ptr(), out.data_ptr(), out.shape[0], num_outputs, depth
        )
        assert inside, f"token ids lie in [0, {num_outputs})"
        return out

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, offset: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        num_rows, size = x.shape
        assert weight.shape == (size,)
        assert weight.is_contiguous()
        x = x.contiguous()
        normed = torch.empty_like(x)
        stream = x
        if residual is not None:
            residual = residual.contiguous()
            stream = torch.empty_like(x)
        self._rms_norm[x.dtype](
            x.data_ptr(),
            weight.data_ptr(),
            None if residual is None else residual.data_ptr(),
            normed.data_ptr(),
            stream.data_ptr(),
            num_rows,
            size,
            eps,
            offset,
            torch.get_num_threads(),
        )
        return normed, stream

    def gated_activation(self, gate_up: Tensor, kind: str) -> Tensor:
        num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        gate_up = gate_up.contiguous()
        out = gate_up.new_empty(num_rows, size)
        self._gated_activation[gate_up.dtype](
            gate_up.data_ptr(), out.data_ptr(), num_rows, size, ACTIVATIONS.index(kind), torch.get_num_threads()
        )
        return out

    def ordered_columns(self, x: Tensor, order: Tensor) -> Tensor:
        """order: [C] int64, each in [-1, columns of x), which is not checked here."""
        assert order.dtype == torch.int64
        assert order.is_contiguous()
        num_rows, size = x.shape
        x = x.contiguous()
        out = x.new_empty(num_rows, order.numel())
        self._ordered_columns[x.dtype](
            x.data_ptr(),
            order.data_ptr(),
            out.data_ptr(),
            num_rows,
            order.numel(),
            size,
            torch.get_num_threads(),
        )
        return out

    def rope_kv_write(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor | None,
        num_heads: int,
        *,
        rotary_offset: int = 0,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        norm_eps: float = 0.0,
        norm_offset: float = 0.0,
    ) -> Tensor:
        """key_blocks and value_blocks have the same strides."""
        assert cos.dtype == sin.dtype == torch.float32
        assert positions.dtype == slots.dtype == torch.int64
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        assert positions.is_contiguous()
        assert slots.is_contiguous()
        for norm in (query_norm, key_norm):
            assert norm is None or (norm.dtype == qkv.dtype and norm.is_contiguous())
        num_tokens, row = qkv.shape
        _, num_kv_heads, block_tokens, _ = key_blocks.shape
        head_dim = row // (num_heads + num_kv_heads * (1 if value_blocks is None else 2))
        qkv = qkv.contiguous()
        q = qkv.new_empty(num_tokens, num_heads, head_dim)
        self._rope_kv_write[qkv.dtype, key_blocks.dtype](
            qkv.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            None if query_norm is None else query_norm.data_ptr(),
            None if key_norm is None else key_norm.data_ptr(),
            key_blocks.data_ptr(),
            None if value_blocks is None else value_blocks.data_ptr(),
            q.data_ptr(),
            num_tokens,
            num_heads,
            num_kv_heads,
            head_dim,
            rotary_offset,
            2 * cos.shape[1],
            block_tokens,
            *key_blocks.stride()[:3],
            norm_eps,
            norm_offset,
            torch.get_num_threads(),
        )
        return q

    def paged_attention(
        self,
        q: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """key_blocks and value_blocks have the same strides; a row of block_tables is dense."""
        assert block_tables.dtype == query_starts.dtype == context_lens.dtype == torch.int32
        assert block_tables.stride(1) == 1
        assert query_starts.is_contiguous()
        assert context_lens.is_contiguous()
        num_tokens, num_heads, _ = q.shape
        num_kv_heads, block_tokens = key_blocks.shape[1:3]
        key_dim, value_dim = row_dims(key_blocks, value_blocks)
        q = q.contiguous()
        out = q.new_empty(num_tokens, num_heads * value_dim)
        self._attention[q.dtype, key_blocks.dtype](
            q.data_ptr(),
            key_blocks.data_ptr(),
            value_blocks.data_ptr(),
            block_tables.data_ptr(),
            query_starts.data_ptr(),
            context_lens.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            out.data_ptr(),
            context_lens.shape[0],
            num_heads,
            num_kv_heads,
            key_dim,
            value_dim,
            block_tokens,
            block_tables.stride(0),
            *key_blocks.stride()[:3],
            NO_WINDOW if window is None else window,
            scale,
            softcap or 0.0,
            torch.get_num_threads(),
        )
        return out

    def moe_route(
        self,
        logits: Tensor,
        *,
        experts_per_token: int,
        scoring: str,
        normalise: bool,
        scale: float,
        bias: Tensor | None,
        num_groups: int,
        groups_per_token: int,
        group_score: str,
    ) -> tuple[Tensor, Tensor]:
        num_tokens, num_experts = logits.shape
        logits = logits.contiguous()
        bias = None if bias is None else bias.contiguous()
        expert_ids = logits.new_empty(num_tokens, experts_per_token, dtype=torch.int64)
        weights = logits.new_empty(num_tokens, experts_per_token)
        self._moe_route(
            logits.data_ptr(),
            None if bias is None else bias.data_ptr(),
            expert_ids.data_ptr(),
            weights.data_ptr(),
            num_tokens,
            num_experts,
            experts_per_token,
            num_groups,
            groups_per_token,
            _SCORINGS.index(scoring),
            group_score == "top2",
            normalise,
            scale,
            torch.get_num_threads(),
        )
        return expert_ids, weights

    def moe_mlp(
        self,
        x: Tensor,
        addresses: Tensor,
        panel_dtypes: tuple[torch.dtype, torch.dtype],
        expert_ids: Tensor,
        weights: Tensor,
        intermediate_size: int,
        activation_kind: str,
    ) -> Tensor:
        """addresses: [4, E] int64, as kernels.moe_mlp.PackedExperts has them; panel_dtypes: of gate_up, of down."""
        assert all(dtype in (x.dtype, _QUANTISED) for dtype in panel_dtypes)
        assert addresses.dtype == expert_ids.dtype == torch.int64
        assert weights.dtype == torch.float32
        assert addresses.is_contiguous()
        x, expert_ids, weights = x.contiguous(), expert_ids.contiguous(), weights.contiguous()
        num_tokens, hidden_size = x.shape
        num_experts = addresses.shape[1]
        out = x.new_empty(num_tokens, hidden_size)
        inside = self._moe_mlp[x.dtype](
            x.data_ptr(),
            addresses.data_ptr(),
            expert_ids.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            num_tokens,
            expert_ids.shape[1],
            num_experts,
            hidden_size,
            intermediate_size,
            ACTIVATIONS.index(activation_kind),
            *(dtype == _QUANTISED for dtype in panel_dtypes),
            torch.get_num_threads(),
        )
        assert inside, f"expert ids lie in [-1, {num_experts})"
        return out

    def sample(
        self, scores: Tensor, options: Tensor, streams: Tensor, first_id: int, ids: Tensor | None, totals: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As kernels.sampling.sample takes them; scores in float32."""
        num_rows, width = scores.shape
        scores, options, streams = scores.contiguous(), options.contiguous(), streams.contiguous()
        ids = None if ids is None else ids.contiguous()
        totals = torch.zeros_like(streams) if totals is None else totals.contiguous()
        assert scores.dtype == torch.float32
        assert (options.dtype, options.shape) == (torch.float64, (num_rows, 4))
        assert streams.dtype == totals.dtype == torch.int64
        assert streams.shape == totals.shape == (num_rows,)
        assert ids is None or (ids.dtype, ids.shape) == (torch.int64, (width,))
        token_ids, keys = streams.new_empty(num_rows), options.new_empty(num_rows)
        self._sample(
            scores.data_ptr(),
            None if ids is None else ids.data_ptr(),
            options.data_ptr(),
            streams.data_ptr(),
            totals.data_ptr(),
            token_ids.data_ptr(),
            keys.data_ptr(),
            num_rows,
            width,
            first_id,
            torch.get_num_threads(),
        )
        return token_ids, keys

    def masses(self, scores: Tensor, greatest: float, temperature: float) -> Tensor:
        """scores: [N] float32, none above `greatest`."""
        assert scores.dtype == torch.float32
        scores = scores.contiguous()
        out = scores.new_empty(scores.shape[0], dtype=torch.int64)
        self._masses(scores.data_ptr(), greatest, temperature, out.data_ptr(), out.shape[0])
        return out

    def covers(self, x: torch.dtype, blocks: torch.dtype) -> bool:
        """Whether it was compiled for these activations over KV blocks of that dtype."""
        return (x, blocks) in self._attention

    # ---- for kernels/cpu/program.py: addresses of the same functions -------------------------------------------------

    def linear_function(self, x: torch.dtype, panels: torch.dtype, out: torch.dtype) -> int:
        return _address(self._linear[x, panels, out])

    def rms_norm_function(self, x: torch.dtype) -> int:
        return _address(self._rms_norm[x])

    def gated_activation_function(self, x: torch.dtype) -> int:
        return _address(self._gated_activation[x])

    def ordered_columns_function(self, x: torch.dtype) -> int:
        return _address(self._ordered_columns[x])

    def rope_kv_write_function(self, x: torch.dtype, blocks: torch.dtype) -> int:
        return _address(self._rope_kv_write[x, blocks])

    def paged_attention_function(self, q: torch.dtype, blocks: torch.dtype) -> int:
        return _address(self._attention[q, blocks])

    def read_bytes(self, memory: Tensor) -> int:
        """Reads `memory` once, all threads sharing, as `linear` reads weights at one row; for measuring bandwidth."""
        return int(self._read(memory.data_ptr(), memory.numel() * memory.element_size(), torch.get_num_threads()))


def _address(function: Any) -> int:
    address = ctypes.cast(function, _P).value
    assert address is not None
    return address


@functools.cache
def shared_library() -> Library | None:
    """The library for this machine, compiled at the first call (seconds); None where it cannot be had, said once."""
    try:
        return Library(build())
    except (BuildFailed, OSError) as error:
        logging.getLogger(__name__).warning(
            "CPU kernels are not available: torch serves, slower, and rounds otherwise in another batch: %s",
            error,
        )
        return None


def library_for(x: Tensor, *others: Tensor, blocks: Tensor | None = None) -> Library | None:
    """What computes on tensors of this kind in the place of a reference: None for another device or dtype.

    `blocks` are of the KV memory, which may be row-quantised.
    """
    if not x.is_cpu or any(tensor.dtype not in _SUFFIX for tensor in (x, *others)):
        return None
    if blocks is not None and blocks.dtype not in _KV_SUFFIX:
        return None
    return shared_library()


@dataclasses.dataclass(frozen=True, slots=True)
class Status:
    """What `legato doctor` shows."""

    available: bool
    built: bool  # False: compiled at first use
    detail: str


def status(cache: Path | None = None) -> Status:
    """Compiles nothing."""
    try:
        made = recipe()
    except BuildFailed as error:
        return Status(False, False, str(error))
    path = (cache or default_cache()) / made.name
    place = f"built: {path}" if path.is_file() else "not built yet; the first use compiles them, in seconds"
    return Status(True, path.is_file(), f"{made.compiler}; {place}")
