"""Paged attention against NumPy in float64, and a query's bits whatever chunk, batch and block size it is part of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from paged_sequences import Heads, Options, PagedSequences, Span
from torch import Tensor

from kernels.cpu.library import Library

FP32, BF16, INT8, FP8 = torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn
KV_DTYPES = {"kv_fp32": FP32, "kv_bf16": BF16, "kv_int8": INT8, "kv_fp8": FP8}
SMOL, SINGLE, ODD, WIDE = Heads(9, 3, 64), Heads(4, 4, 80), Heads(5, 1, 6), Heads(14, 2, 128)
PHI, TALL, NARROW = Heads(6, 2, 96), Heads(4, 2, 256), Heads(4, 2, 192, 128)
LATENT, MANY, SLIM = Heads(16, 1, 576, 512, True), Heads(128, 1, 576, 512, True), Heads(21, 1, 37, 22, True)
PLAIN = Options()
ALONE = [Options(window=1), Options(window=7), Options(window=64), Options(window=100), Options(window=10**12)]
ALONE += [Options(softcap=5.0), Options(softcap=50.0), Options(sinks=True)]
COMBINED = [Options(window=70, softcap=3.0), Options(window=70, sinks=True), Options(softcap=3.0, sinks=True)]
COMBINED += [Options(window=66, softcap=3.0, sinks=True)]


def attend(library: Library, sequences: PagedSequences, spans: list[Span], options: Options = PLAIN) -> list[Tensor]:
    arguments, keywords = sequences.call(spans, options)
    return list(library.paged_attention(*arguments, **keywords).split([end - begin for _, begin, end in spans]))


def check(library: Library, sequences: PagedSequences, spans: list[Span], options: Options = PLAIN) -> None:
    dtype = sequences.queries[0].dtype
    if dtype == BF16 and sequences.kv_dtype == FP32:  # the kernel takes the keys and values in the queries' dtype
        sequences.keys = [keys.to(dtype) for keys in sequences.keys]
        sequences.values = [values.to(dtype) for values in sequences.values]
    for got, span in zip(attend(library, sequences, spans, options), spans, strict=True):
        out, size = sequences.expected(span, options)
        # bf16: the result and each weight are rounded once, half a unit in the last place each. fp32: the scores' sums
        # grow with the dimension, and what the cap's product is rounded by is a weight's relative error.
        close = 2**-18 * max(sequences.heads.key_dim / 128, (options.softcap or 0) / 16, 1)
        bound = 2**-8 * 1.05 * (np.abs(out) + size) if dtype == BF16 else size * close
        assert (np.abs(got.double().numpy() - out) <= bound).all()


@pytest.mark.parametrize("heads", [SMOL, SINGLE, ODD, WIDE, PHI, TALL, NARROW, LATENT, SLIM], ids=str)
@pytest.mark.parametrize("kv", list(KV_DTYPES))
@pytest.mark.usefixtures("guarded", "one_thread")
def test_it_agrees_with_float64(library: Library, heads: Heads, dtype: torch.dtype, kv: str) -> None:
    lengths = [1, 2, 3, 64, 65, 123, 210]
    sequences = PagedSequences(heads, lengths, dtype, KV_DTYPES[kv], block_tokens=5)
    spans = [(index, length * index // 8, length) for index, length in enumerate(lengths)]
    spans[5] = (5, 122, 123)
    if heads.key_dim > 128:  # NumPy takes its time
        spans = [(index, max(begin, end - 9), end) for index, begin, end in spans]
    check(library, sequences, spans)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("kv", list(KV_DTYPES))
@pytest.mark.usefixtures("guarded", "one_thread")
def test_a_group_larger_than_an_item(library: Library, dtype: torch.dtype, kv: str, threads: int) -> None:
    torch.set_num_threads(threads)
    sequences = PagedSequences(MANY, [70, 129], dtype, KV_DTYPES[kv], block_tokens=16)
    check(library, sequences, [(0, 69, 70), (1, 125, 129)])
    check(library, sequences, [(1, 127, 129)], Options(window=40, softcap=5.0, sinks=True))


@pytest.mark.parametrize("options", ALONE + COMBINED, ids=str)
@pytest.mark.parametrize("heads", [SMOL, SLIM], ids=str)
@pytest.mark.parametrize("quantised", [None, INT8], ids=str)
@pytest.mark.usefixtures("guarded", "one_thread")
def test_options_agree_with_float64(
    library: Library, heads: Heads, dtype: torch.dtype, quantised: torch.dtype | None, options: Options
) -> None:
    sequences = PagedSequences(heads, [1, 66, 300, 211], dtype, quantised or dtype, block_tokens=7)
    check(library, sequences, [(0, 0, 1), (1, 20, 66), (2, 299, 300), (3, 130, 211)], options)


@pytest.mark.parametrize("options", [PLAIN, Options(window=30), Options(window=66, softcap=3.0, sinks=True)], ids=str)
@pytest.mark.parametrize("heads", [SMOL, ODD, SLIM], ids=str)
@pytest.mark.parametrize("quantised", [None, FP8], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_a_query_has_the_same_bits_in_any_chunk_and_batch(
    library: Library, heads: Heads, dtype: torch.dtype, quantised: torch.dtype | None, options: Options
) -> None:
    length = 138
    sequences = PagedSequences(heads, [length] + [10 * i + 1 for i in range(9)], dtype, quantised or dtype, 16)
    alone = torch.cat([attend(library, sequences, [(0, i, i + 1)], options)[0] for i in range(length)])
    others = [(i, (10 * i - 10) // 2, 10 * i - 9) for i in range(1, 10)]
    for threads, chunks in ((1, (7, 64, length)), (2, (1, 64)), (3, (7, length))):
        torch.set_num_threads(threads)
        for chunk in chunks:
            for begin in range(0, length, chunk) if chunk > 1 else (0, 1, 29, 30, 63, 64, 65, 66, length - 1):
                end = min(begin + chunk, length)
                got = attend(library, sequences, [*others, (0, begin, end)], options)[-1]
                assert torch.equal(got, alone[begin:end])


@pytest.mark.parametrize("dims", [(576, 512, True), (80, None, False)], ids=str)
@pytest.mark.usefixtures("one_thread")
def test_a_head_has_the_same_bits_however_its_group_is_cut(
    library: Library, dtype: torch.dtype, dims: tuple[int, int | None, bool]
) -> None:
    sequences = PagedSequences(Heads(128, 1, *dims), [131], dtype, dtype, 16)
    whole = attend(library, sequences, [(0, 126, 131)])[0]
    for threads in (2, 8, 16):
        torch.set_num_threads(threads)
        assert torch.equal(attend(library, sequences, [(0, 130, 131)])[0], whole[-1:])
        assert torch.equal(attend(library, sequences, [(0, 126, 131)])[0], whole)


@pytest.mark.parametrize("kv", list(KV_DTYPES))
@pytest.mark.usefixtures("one_thread")
def test_the_size_of_a_block_changes_no_bit(library: Library, dtype: torch.dtype, kv: str) -> None:
    outs = []
    drawn = PagedSequences(SMOL, [150], dtype, FP32, 16)
    for block_tokens in (1, 5, 16, 64):
        sequences = PagedSequences(SMOL, [150], dtype, KV_DTYPES[kv], block_tokens)
        sequences.write(0, drawn.keys[0], drawn.values[0])
        sequences.queries = drawn.queries
        outs.append(attend(library, sequences, [(0, 0, 150)])[0])
    for other in outs[1:]:
        assert torch.equal(other, outs[0])


@pytest.mark.usefixtures("one_thread")
def test_a_window_reads_nothing_before_it(library: Library, dtype: torch.dtype) -> None:
    """A million blocks that are nowhere: what walked over them would read far outside of the memory."""
    context, block_tokens, window = 1 << 24, 16, 9
    sequences = PagedSequences(Heads(4, 2, 8), [48], dtype, dtype, block_tokens)
    tables = torch.full((1, context // block_tokens), 1 << 30, dtype=torch.int32)
    tables[0, -3:] = sequences.tables[0, :3]
    (q, keys, values, _, starts, _, scale), keywords = sequences.call([(0, 40, 48)], Options(window=window))
    near = library.paged_attention(q, keys, values, sequences.tables, starts, starts[1:] * 0 + 48, scale, **keywords)
    far = library.paged_attention(q, keys, values, tables, starts, starts[1:] * 0 + context, scale, **keywords)
    np.testing.assert_allclose(far.double().numpy(), near.double().numpy(), rtol=2**-7, atol=2**-7)


def test_a_huge_score_does_not_overflow(library: Library) -> None:
    for options in (PLAIN, Options(sinks=True), Options(softcap=30.0)):
        sequences = PagedSequences(SMOL, [100], FP32, FP32, block_tokens=16)
        sequences.queries[0] *= 1e4
        sequences.queries[0][:50] *= -1
        got = attend(library, sequences, [(0, 0, 100)], options)[0]
        expected, _ = sequences.expected((0, 0, 100), options)
        assert np.abs(got.double().numpy() - expected).max() < 1e-2


@pytest.mark.usefixtures("one_thread")
def test_a_sink_of_any_size(library: Library, dtype: torch.dtype) -> None:
    sequences = PagedSequences(SMOL, [80], dtype, dtype, block_tokens=16)
    plain = attend(library, sequences, [(0, 0, 80)])[0]
    sequences.sink_logits.fill_(-float("inf"))
    torch.testing.assert_close(attend(library, sequences, [(0, 0, 80)], Options(sinks=True))[0], plain)
    sequences.sink_logits.fill_(500.0)
    assert not attend(library, sequences, [(0, 0, 80)], Options(sinks=True))[0].any()
