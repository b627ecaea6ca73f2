"""The layers of a rank as one native call: operations recorded once, executed on the rows of each step.

Between two kernels Python takes as long as a small kernel: with 30 layers, 2 ms a step. What a program computes is bit
for bit what the same kernels give when they are called one by one (kernels/cpu/program.cpp calls the same functions).

Buffers are numbers, given by `buffer`; each holds one row of so many elements for every row of a step. Weights, tables
and KV memory are the caller's and must outlive the program.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.cpu.library import ACTIVATIONS, NO_WINDOW, Library
from kernels.kv_rows import row_dims
from kernels.linear import PackedLinear

_LINEAR, _NORM, _GATE, _ROPE, _ATTENTION, _ROWS, _COLUMNS = range(7)
_ALIGNMENT_ELEMENTS = 64


class _Operation(ctypes.Structure):
    """program.cpp's Operation."""

    _fields_ = [
        ("kind", ctypes.c_int64),
        ("function", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("in_", "residual", "out")),
        *((name, ctypes.c_void_p) for name in ("weight", "second", "keys", "values", "cos", "sin")),
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_outputs",
                "depth",
                "num_heads",
                "num_kv_heads",
                "key_dim",
                "value_dim",
                "rotary_offset",
                "rotary_dim",
                "block_tokens",
                "block_stride",
                "head_stride",
                "token_stride",
                "window",
            )
        ),
        *((name, ctypes.c_float) for name in ("eps", "offset", "scale", "softcap")),
    ]


class _Step(ctypes.Structure):
    """program.cpp's Step."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("num_rows", "num_sequences", "table_stride", "num_wanted")),
        *(
            (name, ctypes.c_void_p)
            for name in ("positions", "slots", "wanted", "block_tables", "query_starts", "context_lens")
        ),
    ]


class Program:
    """Methods that record are called in the order of execution; then `run`, one step at a time."""

    def __init__(self, library: Library, dtype: torch.dtype) -> None:
        assert library.operation_bytes() == ctypes.sizeof(_Operation)
        self._library, self._dtype = library, dtype
        self._widths: list[int] = []
        self._ordered: dict[int, int] = {}  # number of columns -> buffer
        self._recorded: list[_Operation] = []
        self._kept: list[Tensor] = []  # what the operations point at
        self._packed: Any = None
        self._arenas: list[Tensor] = []
        self._rows = 0

    @property
    def length(self) -> int:
        """Operations recorded so far."""
        return len(self._recorded)

    def buffer(self, width: int) -> int:
        """A new one, of `width` elements a row."""
        self._widths.append(width)
        return len(self._widths) - 1

    def linear(self, source: int, packed: PackedLinear, target: int) -> None:
        depth = packed.k
        if packed.order is not None:
            source, depth = self._ordered_columns(source, packed.order), packed.order.numel()
        function = self._library.linear_function(self._dtype, packed.weight.dtype, self._dtype)
        self._record(
            _LINEAR,
            function,
            source,
            target,
            weight=packed.weight,
            second=packed.bias,
            num_outputs=packed.n,
            depth=depth,
        )

    def _ordered_columns(self, source: int, order: Tensor) -> int:
        """The buffer that has them until the next ones of their number."""
        if (target := self._ordered.get(order.numel())) is None:
            target = self._ordered[order.numel()] = self.buffer(order.numel())
        function, size = self._library.ordered_columns_function(self._dtype), self._widths[source]
        self._record(_COLUMNS, function, source, target, weight=order, num_outputs=order.numel(), depth=size)
        return target

    def rms_norm(
        self, source: int, weight: Tensor, eps: float, target: int, *, stream: int | None = None, offset: float = 0.0
    ) -> None:
        """With a stream: `source` is added to it, in place, and what is normed is the stream."""
        function = self._library.rms_norm_function(self._dtype)
        residual = -1 if stream is None else stream
        self._record(
            _NORM,
            function,
            source,
            target,
            residual=residual,
            weight=weight,
            depth=weight.shape[0],
            eps=eps,
            offset=offset,
        )

    def gated_activation(self, source: int, kind: str, target: int) -> None:
        function = self._library.gated_activation_function(self._dtype)
        size = self._widths[target]
        self._record(_GATE, function, source, target, num_outputs=ACTIVATIONS.index(kind), depth=size)

    def rope_kv_write(
        self,
        source: int,
        cos: Tensor,
        sin: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        num_heads: int,
        target: int,
        *,
        query_norm: Tensor | None = None,
        key_norm: Tensor | None = None,
        norm_eps: float = 0.0,
        norm_offset: float = 0.0,
    ) -> None:
        self._record(
            _ROPE,
            self._library.rope_kv_write_function(self._dtype, key_blocks.dtype),
            source,
            target,
            weight=query_norm,
            second=key_norm,
            cos=cos,
            sin=sin,
            rotary_dim=2 * cos.shape[1],
            eps=norm_eps,
            offset=norm_offset,
            **self._heads(key_blocks, value_blocks, num_heads),
        )

    def paged_attention(
        self,
        source: int,
        key_blocks: Tensor,
        value_blocks: Tensor,
        num_heads: int,
        scale: float,
        target: int,
        *,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> None:
        self._record(
            _ATTENTION,
            self._library.paged_attention_function(self._dtype, key_blocks.dtype),
            source,
            target,
            weight=sinks,
            window=NO_WINDOW if window is None else window,
            scale=scale,
            softcap=softcap or 0.0,
            **self._heads(key_blocks, value_blocks, num_heads),
        )

    def wanted_rows(self, source: int, target: int) -> None:
        """The wanted rows of `source`, in their order; operations after it have these rows alone."""
        size = self._widths[source] * self._dtype.itemsize
        self._record(_ROWS, None, source, target, depth=size)

    def run(
        self,
        first: Tensor,
        positions: Tensor,
        slots: Tensor,
        block_tables: Tensor,
        query_starts: Tensor,
        context_lens: Tensor,
        wanted_rows: Tensor | None,
        result: int,
        pauses: Sequence[tuple[int, Callable[[], None]]] = (),
    ) -> Tensor:
        """`first` [T, width] goes into buffer 0; the others as in paged_attention and rope_kv_write. Returns buffer
        `result`, [T or W, width], a view that the next run writes over.

        `pauses`: what is called between operations, after so many of them, rising; none lies behind `wanted_rows`.
        An exception ends the run."""
        num_rows = first.shape[0]
        num_wanted = num_rows if wanted_rows is None else wanted_rows.shape[0]
        self._prepare(num_rows)
        self._arenas[0][: first.numel()] = first.flatten()
        step = _Step(
            num_rows,
            context_lens.shape[0],
            block_tables.stride(0),
            num_wanted,
            positions.data_ptr(),
            slots.data_ptr(),
            None if wanted_rows is None else wanted_rows.data_ptr(),
            block_tables.data_ptr(),
            query_starts.data_ptr(),
            context_lens.data_ptr(),
        )
        done = 0
        for count, pause in pauses:
            self._execute(done, count, step)
            pause()
            done = count
        self._execute(done, len(self._recorded), step)
        width = self._widths[result]
        return self._arenas[result][: num_wanted * width].view(num_wanted, width)

    def _execute(self, start: int, end: int, step: _Step) -> None:
        first = ctypes.addressof(self._packed) + start * ctypes.sizeof(_Operation)
        threads = torch.get_num_threads()
        self._library.run_program(first, end - start, self._pointers, ctypes.byref(step), threads)

    def _record(self, kind: int, function: int | None, source: int, target: int, **fields: Any) -> None:
        fixed: dict[str, Any] = {"residual": -1}
        for name, value in fields.items():
            if isinstance(value, Tensor):
                self._kept.append(value)
                value = value.data_ptr()
            fixed[name] = value
        self._recorded.append(_Operation(kind=kind, function=function, in_=source, out=target, **fixed))

    def _heads(self, key_blocks: Tensor, value_blocks: Tensor, num_heads: int) -> dict[str, Any]:
        key_dim, value_dim = row_dims(key_blocks, value_blocks)
        block_stride, head_stride, token_stride = key_blocks.stride()[:3]
        return {
            "keys": key_blocks,
            "values": value_blocks,
            "num_heads": num_heads,
            "num_kv_heads": key_blocks.shape[1],
            "key_dim": key_dim,
            "value_dim": value_dim,
            "block_tokens": key_blocks.shape[2],
            "block_stride": block_stride,
            "head_stride": head_stride,
            "token_stride": token_stride,
        }

    def _prepare(self, num_rows: int) -> None:
        """Buffers for so many rows: grown, never shrunk, so that steps of one size allocate nothing."""
        if self._packed is None:
            self._packed = (_Operation * len(self._recorded))(*self._recorded)
        if num_rows > self._rows:
            self._rows = max(num_rows, 2 * self._rows)
            self._arenas = [
                torch.empty(self._rows * width + _ALIGNMENT_ELEMENTS, dtype=self._dtype) for width in self._widths
            ]
            addresses = [arena.data_ptr() for arena in self._arenas]
            self._pointers = (ctypes.c_void_p * len(addresses))(*addresses)
