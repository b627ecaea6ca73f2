"""The content digest against an independent one, in integers without end, and what it must not miss."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest
import torch
import xxhash

from kvtransfer import copying, row_sums
from kvtransfer import digest as digests
from kvtransfer.copying import copy
from kvtransfer.digest import HeldDigest, counting, digest_of
from kvtransfer.grids import TransferPlan
from kvtransfer.plan import RankGrids, RankKV, plan_transfer, segments_of
from kvtransfer.routes import RankMemory
from kvtransfer.row_sums import no_rows
from spec.dtype import Dtype
from spec.errors import InvalidParameter
from spec.layout import KVLayout

DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.INT8: torch.int8,
}
MASK = 2**64 - 1
# The first 192 bytes of XXH3's default secret, from xxhash.h.
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


@pytest.fixture(autouse=True, params=["compiled", "portable"])
def _one_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    if request.param == "portable":
        monkeypatch.setattr(row_sums, "shared_row_sums", lambda: None)
        monkeypatch.setattr(copying, "shared_copy", lambda: None)


def chunk_digest(kv: torch.Tensor, layout: KVLayout, block_ids: list[int], first_token: int, num_tokens: int) -> bytes:
    """Of a rank alone."""
    whole = HeldDigest(RankMemory(RankKV.whole(layout)), kv, block_ids, first_token, num_tokens)
    for call in whole.counting(range(layout.num_layers)):
        call()
    return whole.digest()


def noise(layout: KVLayout, num_blocks: int, seed: int = 0) -> torch.Tensor:
    drawn = numpy.random.default_rng(seed).integers(0, 256, num_blocks * layout.block_bytes, dtype=numpy.uint8)
    return torch.from_numpy(drawn).view(DTYPES[layout.dtype]).view(layout.shape(num_blocks))


def in_bytes(kv: torch.Tensor) -> numpy.ndarray:
    return kv.view(torch.uint8).numpy()


def splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def row_oracle(row: bytes, plane: int, head: int, token: int) -> list[int]:
    """As row_sums.py's page says it, a word at a time."""
    words = [int.from_bytes(row[at : at + 8], "little") for at in range(0, len(row), 8)]
    words += [0] * (-len(words) % 8)
    sums = [0] * 8
    for number, word in enumerate(words):
        stripe, lane = divmod(number, 8)
        if lane == 0 and stripe and stripe % 16 == 0:
            keys = [int.from_bytes(SECRET[128 + 8 * each : 136 + 8 * each], "little") for each in range(8)]
            sums = [(value ^ (value >> 47) ^ key) * 0x9E3779B1 & MASK for value, key in zip(sums, keys, strict=True)]
        at = 8 * (stripe % 16 + lane)
        mixed = word ^ int.from_bytes(SECRET[at : at + 8], "little")
        sums[lane] += (mixed & 0xFFFFFFFF) * (mixed >> 32)
        sums[lane ^ 1] += word
        sums = [value & MASK for value in sums]
    place = splitmix64(plane << 48 | head << 32 | token)
    factors = place | 1, ((place << 32 | place >> 32) & MASK) | 1
    return [(value ^ (value >> 32)) * factors[lane % 2] & MASK for lane, value in enumerate(sums)]


def oracle(kv: torch.Tensor, block_ids: list[int], first_token: int, num_tokens: int) -> bytes:
    array = in_bytes(kv)
    _, layers, planes, heads, block_tokens, row_bytes = array.shape
    total, nbytes = [0] * 8, 0
    for layer, plane, head in itertools.product(range(layers), range(planes), range(heads)):
        for token in range(first_token, first_token + num_tokens):
            row = array[block_ids[token // block_tokens], layer, plane, head, token % block_tokens].tobytes()
            term = row_oracle(row, layer * planes + plane, head, token)
            total = [(one + other) & MASK for one, other in zip(total, term, strict=True)]
            nbytes += row_bytes
    return xxhash.xxh3_128_digest(b"".join(value.to_bytes(8, "little") for value in (*total, nbytes)))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("first_token", "num_tokens"), [(0, 1), (0, 12), (0, 31), (3, 7), (5, 1), (12, 19), (16, 15)])
def test_it_equals_an_independent_one(dtype: Dtype, first_token: int, num_tokens: int) -> None:
    layout = KVLayout(3, 2, 6, 4, dtype)
    kv, block_ids = noise(layout, 11), [9, 2, 7, 0, 10, 4, 1, 8]
    digest = chunk_digest(kv, layout, block_ids, first_token, num_tokens)
    assert len(digest) == 16
    assert digest == oracle(kv, block_ids, first_token, num_tokens)


@pytest.mark.parametrize("shift", [0, 16])
@pytest.mark.parametrize("head_dim", [1, 31, 32, 33, 64, 96, 128, 160, 256, 511, 512, 513, 576, 1100])
def test_rows_of_any_size_are_digested_in_the_same_way_and_copied(head_dim: int, shift: int) -> None:
    layout = KVLayout(2, 1, head_dim, 3, Dtype.BFLOAT16, planes=1)
    kv, block_ids = noise(layout, 4), [2, 0, 3]
    room = torch.zeros(4 * layout.block_bytes + 128, dtype=torch.uint8)
    start = -room.data_ptr() % 64 + shift  # of a line of a cache
    there = room[start : start + 4 * layout.block_bytes].view(DTYPES[layout.dtype]).view(layout.shape(4))
    expected = oracle(kv, block_ids, 1, 7)
    assert chunk_digest(kv, layout, block_ids, 1, 7) == expected
    rank, sums, lands_in = RankKV.whole(layout), no_rows(), [1, 2, 0]
    segments = segments_of(layout, block_ids, layout, lands_in, 1, 7)
    for grid in RankGrids(segments, rank, 0, rank, 0, sums).of(range(2)):
        copy(grid, kv.data_ptr(), there.data_ptr())
    assert digest_of(sums) == expected
    assert oracle(there, lands_in, 1, 7) == expected


def test_however_the_work_is_cut_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = KVLayout(5, 2, 6, 4, Dtype.BFLOAT16)
    kv, block_ids = noise(layout, 8), [3, 1, 6, 0]
    whole = chunk_digest(kv, layout, block_ids, 2, 11)
    monkeypatch.setattr(digests, "_SHARE_BYTES", 1)
    for threads in (1, 2, 3):
        monkeypatch.setattr(digests, "THREADS", threads)
        parts = HeldDigest(RankMemory(RankKV.whole(layout)), kv, block_ids, 2, 11)
        calls = [call for layers in (range(3, 5), range(1), range(1, 3)) for call in parts.counting(layers)]
        assert len(calls) == 3 * threads
        for call in random.Random(threads).sample(calls, len(calls)):
            call()
        assert parts.digest() == whole


@pytest.mark.parametrize("block_tokens", [1, 3, 8, 16])
def test_it_survives_a_change_of_block_size_and_of_block_ids(block_tokens: int) -> None:
    source = RankKV.whole(KVLayout(3, 2, 8, 4, Dtype.FLOAT16))
    target = RankKV.whole(KVLayout(3, 2, 8, block_tokens, Dtype.FLOAT16))
    source_kv, source_blocks = noise(source.layout, 13), [5, 11, 0, 7, 2, 9]
    target_blocks = random.Random(1).sample(range(40), target.layout.blocks_for(23))
    target_kv = noise(target.layout, 40, seed=2)
    flat_source, flat_target = source_kv.view(torch.uint8).view(-1), target_kv.view(torch.uint8).view(-1)
    for piece in plan_transfer(source, source_blocks, target, target_blocks, 0, 23):
        landed = flat_source[piece.source_offset : piece.source_offset + piece.nbytes]
        flat_target[piece.target_offset : piece.target_offset + piece.nbytes] = landed
    for first_token, num_tokens in ((0, 23), (5, 11)):
        ours = chunk_digest(source_kv, source.layout, source_blocks, first_token, num_tokens)
        assert chunk_digest(target_kv, target.layout, target_blocks, first_token, num_tokens) == ours


def test_a_block_larger_than_a_write_is_cut_between_runs() -> None:
    layout = KVLayout(3, 2, 8, 4, Dtype.FLOAT16)
    kv, sums, rank = noise(layout, 2), no_rows(), RankKV.whole(layout)
    grids = RankGrids(segments_of(layout, [1, 0], layout, [0, 1], 0, 8), rank, 0, rank, 0, sums).of(range(3))
    for run_bytes in (1, 64, 100, 129, 10_000):
        sums[:] = 0
        parts = [part for grid in grids for part in grid.cut(run_bytes, run_bytes, 100)]
        assert all(part.nbytes <= max(run_bytes, 64) for part in parts)
        for call in counting(TransferPlan(parts), kv.data_ptr()):
            call()
        assert digest_of(sums) == oracle(kv, [1, 0], 0, 8)


# ---- what it must not miss -------------------------------------------------------------------------------------------


def test_any_bit_of_the_tokens_counts_and_no_other(request: pytest.FixtureRequest) -> None:
    layout = KVLayout(2, 2, 2, 4, Dtype.BFLOAT16)
    kv, block_ids = noise(layout, 3), [2, 0]
    flat = kv.view(torch.uint8).view(-1)
    found = {chunk_digest(kv, layout, block_ids, 2, 5)}
    bits = range(8) if "compiled" in request.node.name else (5,)
    missed = 0
    for at, bit in itertools.product(range(flat.numel()), bits):
        flat[at] ^= 1 << bit
        digest = chunk_digest(kv, layout, block_ids, 2, 5)
        missed += digest in found
        found.add(digest)
        flat[at] ^= 1 << bit
    assert len(found) == 1 + len(bits) * 5 * layout.token_bytes
    assert missed == len(bits) * (flat.numel() - 5 * layout.token_bytes), "those outside alone"


@pytest.mark.parametrize("bit", [0, 31, 63])
def test_rows_that_trade_places_are_seen_even_if_one_bit_is_their_difference(bit: int) -> None:
    layout = KVLayout(2, 2, 4, 4, Dtype.BFLOAT16)
    kv, block_ids = noise(layout, 2), [1, 0]
    rows = in_bytes(kv)
    rows[:] = rows[0, 0, 0, 0, 0]
    before = chunk_digest(kv, layout, block_ids, 0, 8)
    places = list(numpy.ndindex(*rows.shape[:-1]))
    other = rows[places[0]].copy()
    other[bit // 8] ^= 1 << bit % 8
    found = set()
    for place in places:  # wherever the odd one out lies, tokens, heads, planes, layers and blocks apart
        rows[place], kept = other, rows[place].copy()
        found.add(chunk_digest(kv, layout, block_ids, 0, 8))
        rows[place] = kept
    assert len(found | {before}) == len(places) + 1


def test_swapped_blocks_shifted_tokens_and_truncated_pieces_are_seen() -> None:
    layout = KVLayout(2, 2, 4, 4, Dtype.FLOAT32)
    kv, stale = noise(layout, 4), noise(layout, 4, seed=9)
    tables = {(0, 1), (1, 2), (1, 0), (0, 2), (2, 1), (3, 1)}
    ranges = ((0, 8), (0, 7), (1, 7))
    found = [chunk_digest(kv, layout, list(ids), *tokens) for ids in tables for tokens in ranges]
    assert len(set(found)) == len(found)
    flat, old = kv.view(torch.uint8).view(-1).clone(), stale.view(torch.uint8).view(-1)
    for landed in range(0, 2 * layout.block_bytes, 7):  # of blocks 0 and 1; behind it is what was there before
        mixed = torch.cat([flat[:landed], old[landed:]]).view(torch.float32).view(layout.shape(4))
        found.append(chunk_digest(mixed, layout, [0, 1], 0, 8))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("_one_thread", ["portable"], indirect=True)
def test_of_a_million_corruptions_none_is_missed() -> None:
    """Each row beside a damaged one, and beside another with which it trades places: eight lanes of 64 bits tell them
    apart. One in 2^90 may be missed, so none; what one lane misses is what would show a weakness."""
    draw, lanes = numpy.random.default_rng(6), []
    for _ in range(10):
        rows = draw.integers(0, 256, (100_000, 128), dtype=numpy.uint8)
        damaged = rows.copy()
        starts, sizes = draw.integers(0, 128, len(rows)), draw.choice([1, 2, 8, 16, 64, 128], len(rows))
        at = numpy.arange(128)
        hit = (at >= starts[:, None]) & (at < (starts + sizes)[:, None])
        damaged[hit] ^= draw.choice(numpy.array([1, 0x80, 0xFF, 0x55], numpy.uint8), hit.sum())
        places, others = draw.integers(0, 2**20, (2, len(rows)), dtype=numpy.uint64)
        others += numpy.uint64(1) << numpy.uint64(32)
        was, now, there, back = (
            row_sums.terms(each, where)
            for each, where in ((rows, places), (damaged, places), (damaged, others), (rows, others))
        )
        assert (was != now).any(axis=1).all()
        assert (was + there != now + back).any(axis=1).all()
        lanes += [(was != now).sum(axis=1), (was + there != now + back).sum(axis=1)]
    assert min(each.min() for each in lanes) >= 2, "a word is in two lanes"


@pytest.mark.parametrize(
    ("block_ids", "first_token", "num_tokens"), [([0], 0, 5), ([4], 0, 1), ([-1], 0, 1), ([0], 0, 0), ([0], -1, 1)]
)
def test_a_bad_block_table_or_token_range_is_refused(block_ids: list[int], first_token: int, num_tokens: int) -> None:
    layout = KVLayout(1, 1, 2, 4, Dtype.FLOAT32)
    with pytest.raises(InvalidParameter):
        chunk_digest(noise(layout, 4), layout, block_ids, first_token, num_tokens)
