"""Sequences in a paged KV memory, as attention kernels meet them, and what attention over them is in NumPy float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.kv_rows import dequantise_rows, quantise_rows


@dataclasses.dataclass(frozen=True)
class Heads:
    num_heads: int
    num_kv_heads: int
    key_dim: int
    narrow_value_dim: int | None = None  # where it is not key_dim
    latent: bool = False  # a value is its key's first elements, in the same memory

    @property
    def value_dim(self) -> int:
        return self.narrow_value_dim or self.key_dim


@dataclasses.dataclass(frozen=True)
class Options:
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


Span = tuple[int, int, int]  # sequence, first position, end position of the queries in one call


class PagedSequences:
    """Keys, values and queries of sequences of known lengths, laid into blocks in a shuffled order.

    What was never written, what no query of a call sees, and a block that is nobody's, are NaN, which spoils whatever
    it touches; a block that no query sees has no entry in its table.
    """

    def __init__(
        self, heads: Heads, lengths: list[int], dtype: torch.dtype, kv_dtype: torch.dtype, block_tokens: int
    ) -> None:
        self._generator = torch.Generator().manual_seed(sum(lengths))
        self.heads, self.lengths, self.kv_dtype, self.block_tokens = heads, lengths, kv_dtype, block_tokens
        needed = [-(-length // block_tokens) for length in lengths]
        order = torch.randperm(sum(needed) + 3, generator=self._generator).int()
        self.tables = torch.full((len(lengths), max(needed) + 2), -1, dtype=torch.int32)
        self.queries = [self._draw(length, heads.num_heads, heads.key_dim).to(dtype) for length in lengths]
        self.keys, self.values = [], []  # as they are read: [length, Hkv, D or Dv]
        self.sink_logits = self._draw(heads.num_heads) + 1
        scale_bytes = 4 if kv_dtype.itemsize == 1 else 0
        sides, row = 1 if heads.latent else 2, heads.key_dim + scale_bytes
        shape = (sum(needed) + 3, 2, sides, heads.num_kv_heads, block_tokens, row)
        self.memory = self._poison(torch.empty(shape, dtype=kv_dtype))
        for index, length in enumerate(lengths):
            self.tables[index, : needed[index]] = order[sum(needed[:index]) : sum(needed[: index + 1])]
            self.write(
                index,
                self._draw(length, heads.num_kv_heads, heads.key_dim),
                self._draw(length, heads.num_kv_heads, heads.value_dim),
            )

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)

    @staticmethod
    def _poison(memory: Tensor) -> Tensor:
        """Bytes of ones are NaN in every float dtype, and as a row's scale."""
        memory.view(torch.uint8).fill_(255)
        return memory

    def write(self, index: int, keys: Tensor, values: Tensor) -> None:
        """Of a whole new sequence, [length, Hkv, D] and [length, Hkv, Dv]; `values` are not used where latent."""
        if self.kv_dtype.itemsize == 1:
            key_rows, value_rows = quantise_rows(keys, self.kv_dtype), quantise_rows(values, self.kv_dtype)
            keys, values = dequantise_rows(key_rows), dequantise_rows(value_rows)
        else:
            keys, values = key_rows, value_rows = keys.to(self.kv_dtype), values.to(self.kv_dtype)
        position = torch.arange(len(keys))
        place = self.tables[index, position // self.block_tokens].long(), 1
        self._bytes()[(*place, 0, slice(None), position % self.block_tokens)] = key_rows.view(torch.uint8)
        if self.heads.latent:
            values = keys[..., : self.heads.value_dim]
        else:
            side = self._bytes()[:, :, 1:, ..., : value_rows.view(torch.uint8).shape[-1]]
            side[(*place, 0, slice(None), position % self.block_tokens)] = value_rows.view(torch.uint8)
        self.keys.append(keys)
        self.values.append(values)

    def _bytes(self) -> Tensor:
        return self.memory.view(torch.uint8)

    def call(self, spans: list[Span], options: Options) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of paged_attention."""
        memory, tables = self.memory, self.tables[[index for index, _, _ in spans]]
        if options.window is not None:
            memory = memory.clone()
            for row, (_, begin, _) in enumerate(spans):
                hidden = max(begin + 1 - options.window, 0)  # positions before it
                for block, own in enumerate(tables[row, : -(-hidden // self.block_tokens)].tolist()):
                    count = min(hidden - block * self.block_tokens, self.block_tokens)
                    memory.view(torch.uint8)[own, :, :, :, :count] = 255
                    if count == self.block_tokens:
                        tables[row, block] = -1
        key_blocks = memory[:, 1, 0]
        value_row = self.heads.value_dim + (4 if self.kv_dtype.itemsize == 1 and not self.heads.latent else 0)
        value_blocks = memory[:, 1, -1, ..., :value_row]
        queries = torch.cat([self.queries[index][begin:end] for index, begin, end in spans])
        starts = torch.tensor([0, *(end - begin for _, begin, end in spans)]).cumsum(0).int()
        ends = torch.tensor([end for _, _, end in spans]).int()
        scale = self.heads.key_dim**-0.5
        keywords = dict(dataclasses.asdict(options), sinks=self.sink_logits if options.sinks else None)
        return (queries, key_blocks, value_blocks, tables, starts, ends, scale), keywords

    def expected(self, span: Span, options: Options) -> tuple[np.ndarray, np.ndarray]:
        """[queries, num_heads * value_dim] in float64, and the same sum over absolute values."""
        index, begin, end = span
        group = self.heads.num_heads // self.heads.num_kv_heads
        q = self.queries[index][begin:end].double().numpy().swapaxes(0, 1)
        k, v = (part[index][:end].double().numpy().swapaxes(0, 1).repeat(group, 0) for part in (self.keys, self.values))
        scores = q @ k.swapaxes(1, 2) * self.heads.key_dim**-0.5
        if options.softcap is not None:
            scores = np.tanh(scores / options.softcap) * options.softcap
        for i, position in enumerate(range(begin, end)):
            scores[:, i, position + 1 :] = -np.inf
            if options.window is not None:
                scores[:, i, : max(position + 1 - options.window, 0)] = -np.inf
        sinks = np.full((len(q), 1, 1), -np.inf)
        if options.sinks:
            sinks = self.sink_logits.double().numpy()[:, None, None]
        largest = np.maximum(scores.max(-1, keepdims=True), sinks)
        weights = np.exp(scores - largest)
        weights /= weights.sum(-1, keepdims=True) + np.exp(sinks - largest)
        out, size = (weights @ side for side in (v, np.abs(v)))
        return tuple(side.swapaxes(0, 1).reshape(end - begin, -1) for side in (out, size))
