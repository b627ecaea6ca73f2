"""The content digest against an independent one in NumPy, one (layer, key/value, head, token) row at a time."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
import xxhash

from kernels.cpu.row_digest import RowDigest, shared_digests
from kvtransfer import digest as digests
from kvtransfer.digest import Part
from kvtransfer.plan import RankKV, plan_transfer
from spec.dtype import Dtype
from spec.errors import InvalidParameter
from spec.layout import KVLayout

DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16, Dtype.FLOAT16: torch.float16}


@pytest.fixture(autouse=True, params=["where rows lie", "copies"])
def _one_thread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    if request.param == "copies":
        monkeypatch.setattr(digests, "shared_digests", lambda: None)


def chunk_digest(kv: torch.Tensor, block_ids: list[int], first_token: int, num_tokens: int) -> bytes:
    """Of a rank alone."""
    return digests.chunk_digest([Part(kv, range(kv.shape[1]), range(kv.shape[3]))], block_ids, first_token, num_tokens)


def noise(layout: KVLayout, num_blocks: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layout.shape(num_blocks), generator=generator).to(DTYPES[layout.dtype])


def oracle(kv: torch.Tensor, block_ids: list[int], first_token: int, num_tokens: int) -> bytes:
    array = kv.view(torch.int16 if kv.itemsize == 2 else torch.int32).numpy()
    block_tokens = array.shape[4]
    hasher = xxhash.xxh3_128()
    for layer, part, head in numpy.ndindex(array.shape[1], 2, array.shape[3]):
        for token in range(first_token, first_token + num_tokens):
            hasher.update(array[block_ids[token // block_tokens], layer, part, head, token % block_tokens].tobytes())
    return hasher.digest()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(("first_token", "num_tokens"), [(0, 1), (0, 12), (0, 31), (3, 7), (5, 1), (12, 19), (16, 15)])
def test_it_equals_an_independent_one(dtype: Dtype, first_token: int, num_tokens: int) -> None:
    kv = noise(KVLayout(3, 2, 6, 4, dtype), 11)
    block_ids = [9, 2, 7, 0, 10, 4, 1, 8]
    digest = chunk_digest(kv, block_ids, first_token, num_tokens)
    assert len(digest) == 16
    assert digest == oracle(kv, block_ids, first_token, num_tokens)


def test_rows_of_any_size_are_digested_as_xxhash_does() -> None:
    if (native := shared_digests()) is None:
        pytest.skip("no C++ compiler")
    memory = numpy.random.default_rng(3).integers(0, 256, 1 << 17, dtype=numpy.uint8)
    draw = random.Random(4)
    for total in (*range(1, 400, 3), 1023, 1024, 1025, 1088, 2048, 2049, 4096, 10_007, 70_001):
        ours, theirs = RowDigest(native), xxhash.xxh3_128()
        while total:
            sizes = numpy.array([min(total, draw.choice([1, 63, 64, 65, 300, 5000]))], numpy.int64)
            total -= int(sizes[0])
            units = numpy.array([draw.randrange(1 << 16)], numpy.int64)
            segments = numpy.array([draw.randrange(50_000)], numpy.int64)
            ours.add(memory.ctypes.data, units.ctypes.data, 1, segments.ctypes.data, sizes.ctypes.data, 1)
            at = int(units[0] + segments[0])
            theirs.update(memory[at : at + int(sizes[0])].tobytes())
        few = ours.few()
        assert (ours.digest() if few is None else xxhash.xxh3_128_digest(few)) == theirs.digest()


def test_it_does_not_depend_on_how_much_is_gathered_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kv, block_ids = noise(KVLayout(5, 2, 6, 4, Dtype.BFLOAT16), 8), [3, 1, 6, 0]
    whole = chunk_digest(kv, block_ids, 2, 11)
    for stage_bytes in (1, 700, 1500):
        monkeypatch.setattr(digests, "_STAGE_BYTES", stage_bytes)
        assert chunk_digest(kv, block_ids, 2, 11) == whole


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
        ours = chunk_digest(source_kv, source_blocks, first_token, num_tokens)
        assert chunk_digest(target_kv, target_blocks, first_token, num_tokens) == ours


def test_any_byte_of_the_tokens_counts_and_no_other() -> None:
    layout = KVLayout(2, 2, 4, 4, Dtype.BFLOAT16)
    kv, block_ids = noise(layout, 4), [2, 0, 3]
    before = chunk_digest(kv, block_ids, 2, 7)
    flat = kv.view(torch.uint8).view(-1)
    counted = 0
    for at in range(flat.numel()):
        flat[at] ^= 0x40
        counted += chunk_digest(kv, block_ids, 2, 7) != before
        flat[at] ^= 0x40
    assert counted == 7 * layout.token_bytes
    assert chunk_digest(kv, block_ids, 2, 7) == before


def test_swapped_blocks_and_shifted_tokens_are_seen() -> None:
    kv = noise(KVLayout(2, 2, 4, 4, Dtype.FLOAT32), 4)
    tables = ([0, 1, 2], [1, 0, 2], [0, 2, 1], [3, 1, 2])
    digest_of = {
        tuple(ids[first : first + 2]): chunk_digest(kv, ids, first * 4, 8) for ids in tables for first in (0, 1)
    }
    assert len(set(digest_of.values())) == len(digest_of) == 6


@pytest.mark.parametrize(
    ("block_ids", "first_token", "num_tokens"), [([0], 0, 5), ([4], 0, 1), ([-1], 0, 1), ([0], 0, 0), ([0], -1, 1)]
)
def test_a_bad_block_table_or_token_range_is_refused(block_ids: list[int], first_token: int, num_tokens: int) -> None:
    with pytest.raises(InvalidParameter):
        chunk_digest(noise(KVLayout(1, 1, 2, 4, Dtype.FLOAT32), 4), block_ids, first_token, num_tokens)
