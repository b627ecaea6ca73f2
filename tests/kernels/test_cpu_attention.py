"""Paged attention against NumPy in float64, and a query's bits whatever chunk, batch and block size it is part of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.library import Library


@dataclasses.dataclass
class Heads:
    num_heads: int
    num_kv_heads: int
    head_dim: int


SMOL, SINGLE, ODD, WIDE = Heads(9, 3, 64), Heads(4, 4, 80), Heads(5, 1, 6), Heads(14, 2, 128)


class Sequences:
    """Keys, values and queries of sequences of known lengths, laid into blocks in a shuffled order."""

    def __init__(
        self, heads: Heads, lengths: list[int], dtype: torch.dtype, kv_dtype: torch.dtype, block_tokens: int
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        self.heads, self.lengths = heads, lengths
        self.queries, self.keys, self.values = [], [], []
        needed = [-(-length // block_tokens) for length in lengths]
        order = torch.randperm(sum(needed) + 3, generator=generator).int()
        # What was never written, and a block that is nobody's, must not be seen: NaN spoils whatever it touches.
        shape = (sum(needed) + 3, 2, 2, heads.num_kv_heads, block_tokens, heads.head_dim)
        self.memory = torch.full(shape, float("nan"), dtype=kv_dtype)
        self.tables = torch.full((len(lengths), max(needed) + 2), -1, dtype=torch.int32)
        for index, length in enumerate(lengths):
            used = order[sum(needed[:index]) : sum(needed[: index + 1])]
            self.tables[index, : needed[index]] = used
            keys, values = (
                torch.randn(length, heads.num_kv_heads, heads.head_dim, generator=generator).to(kv_dtype) for _ in "kv"
            )
            positions = torch.arange(length)
            place = used[positions // block_tokens].long(), 1
            self.memory[(*place, 0, slice(None), positions % block_tokens)] = keys
            self.memory[(*place, 1, slice(None), positions % block_tokens)] = values
            self.queries.append(torch.randn(length, heads.num_heads, heads.head_dim, generator=generator).to(dtype))
            self.keys.append(keys)
            self.values.append(values)

    def attend(self, library: Library, spans: list[tuple[int, int, int]]) -> list[Tensor]:
        """spans: (sequence, first position, end position) of the queries in one call."""
        queries = torch.cat([self.queries[index][begin:end] for index, begin, end in spans])
        starts = torch.tensor([0, *(end - begin for _, begin, end in spans)]).cumsum(0).int()
        ends = torch.tensor([end for _, _, end in spans]).int()
        tables = self.tables[[index for index, _, _ in spans]]
        out = library.paged_attention(
            queries, self.memory[:, 1, 0], self.memory[:, 1, 1], tables, starts, ends, self.heads.head_dim**-0.5
        )
        return list(out.split([end - begin for _, begin, end in spans]))

    def expected(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """[length, num_heads * head_dim] in float64, and the same sum over absolute values."""
        group = self.heads.num_heads // self.heads.num_kv_heads
        q, k, v = (part[index].double().numpy() for part in (self.queries, self.keys, self.values))
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * self.heads.head_dim**-0.5
        scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out, size = np.einsum("hqk,khd->qhd", weights, v), np.einsum("hqk,khd->qhd", weights, np.abs(v))
        return out.reshape(len(q), -1), size.reshape(len(q), -1)


@pytest.mark.parametrize("heads", [SMOL, SINGLE, ODD, WIDE], ids=str)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=["kv_fp32", "kv_bf16"])
@pytest.mark.usefixtures("guarded", "one_thread")
def test_it_agrees_with_float64(library: Library, heads: Heads, dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    lengths = [1, 2, 3, 64, 65, 123, 210]
    sequences = Sequences(heads, lengths, dtype, kv_dtype, block_tokens=5)
    if torch.bfloat16 == dtype != kv_dtype:  # the kernel takes the keys and values in the queries' dtype
        sequences.keys = [keys.to(dtype) for keys in sequences.keys]
        sequences.values = [values.to(dtype) for values in sequences.values]
    spans = [(index, length * index // 8, length) for index, length in enumerate(lengths)]
    spans[5] = (5, 122, 123)
    for got, (index, begin, end) in zip(sequences.attend(library, spans), spans, strict=True):
        out, size = sequences.expected(index)
        # bf16: the result and each weight are rounded once, half a unit in the last place each.
        bound = 2**-8 * 1.05 * (np.abs(out) + size) if dtype == torch.bfloat16 else size * 2**-18
        assert (np.abs(got.double().numpy() - out[begin:end]) <= bound[begin:end]).all()


@pytest.mark.parametrize("heads", [SMOL, ODD], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_a_query_has_the_same_bits_in_any_chunk_and_batch(library: Library, heads: Heads, dtype: torch.dtype) -> None:
    length = 138
    sequences = Sequences(heads, [length] + [10 * i + 1 for i in range(15)], dtype, dtype, block_tokens=16)
    alone = torch.cat([sequences.attend(library, [(0, i, i + 1)])[0] for i in range(length)])
    others = [(i, (10 * i - 10) // 2, 10 * i - 9) for i in range(1, 16)]
    for threads, chunks in ((1, (7, 64, length)), (2, (1, 64)), (3, (7, length))):
        torch.set_num_threads(threads)
        for chunk in chunks:
            for begin in range(0, length, chunk):
                end = min(begin + chunk, length)
                assert torch.equal(sequences.attend(library, [*others, (0, begin, end)])[-1], alone[begin:end])


@pytest.mark.usefixtures("one_thread")
def test_the_size_of_a_block_changes_no_bit(library: Library, dtype: torch.dtype) -> None:
    outs = []
    for block_tokens in (1, 5, 16, 64):
        sequences = Sequences(SMOL, [150], dtype, dtype, block_tokens)
        drawn = Sequences(SMOL, [150], dtype, dtype, 16)
        positions = torch.arange(150)
        place = sequences.tables[0, positions // block_tokens].long(), 1
        sequences.memory[(*place, 0, slice(None), positions % block_tokens)] = drawn.keys[0]
        sequences.memory[(*place, 1, slice(None), positions % block_tokens)] = drawn.values[0]
        sequences.queries = drawn.queries
        outs.append(sequences.attend(library, [(0, 0, 150)])[0])
    for other in outs[1:]:
        assert torch.equal(other, outs[0])


def test_a_huge_score_does_not_overflow(library: Library) -> None:
    sequences = Sequences(SMOL, [100], torch.float32, torch.float32, block_tokens=16)
    sequences.queries[0] *= 1e4
    sequences.queries[0][:50] *= -1
    got = sequences.attend(library, [(0, 0, 100)])[0]
    expected, _ = sequences.expected(0)
    assert np.abs(got.double().numpy() - expected).max() < 1e-2
