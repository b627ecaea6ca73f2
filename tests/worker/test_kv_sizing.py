"""How many blocks of KV fit: properties over drawn devices, ranks and models, and figures worked out by hand."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest

from spec.dtype import Dtype
from spec.errors import InvalidConfiguration
from spec.layout import KVLayout
from worker.kv_sizing import (
    CPU_TOKENS,
    HEADROOM,
    HOST_SHARE,
    LEAST_TOKENS,
    MemoryUse,
    RankRoom,
    budgets,
    choose_num_blocks,
    said,
)

GIB = 1 << 30
NARROW = KVLayout(3, 1, 6, 7, Dtype.FLOAT16)  # 504 bytes a block
WIDE = KVLayout(5, 1, 6, 7, Dtype.FLOAT16)  # 840 bytes
LLAMA_8B = KVLayout(32, 8, 128, 16, Dtype.BFLOAT16)  # 2 MiB a block


def on_cpu(layout: KVLayout, host: str, free_bytes: int) -> RankRoom:
    return RankRoom(host, MemoryUse("cpu", 64 * GIB, free_bytes, 123, 0, free_bytes), layout)


def on_gpu(layout: KVLayout, device: str = "cuda:0", host: str = "a", **changes: int) -> RankRoom:
    """An 80 GiB card with 16 GiB of weights."""
    use = {"total_bytes": 80 * GIB, "free_bytes": 63 * GIB, "weight_bytes": 16 * GIB, "activation_bytes": 2 * GIB}
    return RankRoom(host, MemoryUse(device=device, **(use | {"host_free_bytes": 1000 * GIB} | changes)), layout)


def test_one_card_that_is_ours() -> None:
    """0.9 · 80 - 16 - 2 = 54 GiB, which is less than the 63 - 4 - 2 that are free."""
    assert choose_num_blocks(None, [on_gpu(LLAMA_8B)], 0.9, 1) == 54 * GIB // (2 << 20)


def test_what_others_hold_is_theirs() -> None:
    """Of 30 GiB free 30 - 4 - 2 are for KV, whatever share is asked for."""
    assert choose_num_blocks(None, [on_gpu(LLAMA_8B, free_bytes=30 * GIB)], 0.9, 1) == 24 * GIB // (2 << 20)


def test_two_workers_on_one_card() -> None:
    """With half of the share each the second finds as much as the first took, though it sees little free."""
    first = choose_num_blocks(None, [on_gpu(LLAMA_8B)], 0.45, 1)
    left = 63 * GIB - first * (2 << 20) - 16 * GIB
    assert choose_num_blocks(None, [on_gpu(LLAMA_8B, free_bytes=left)], 0.45, 1) == first == 18 * GIB // (2 << 20)


def test_the_mirror_on_the_host_must_fit() -> None:
    found = choose_num_blocks(None, [on_gpu(LLAMA_8B, host_free_bytes=20 * GIB)], 0.9, 1)
    assert found == 10 * GIB // (2 << 20)
    with pytest.raises(InvalidConfiguration, match=r"host memory of a is too small.* 0\.15 GiB are missing"):
        choose_num_blocks(None, [on_gpu(LLAMA_8B, host_free_bytes=GIB // 5)], 0.9, 1)


def test_a_draft_model_takes_blocks_of_its_device_and_none_of_the_host() -> None:
    room = dataclasses.replace(on_gpu(LLAMA_8B), draft_block_bytes=1 << 20)
    assert choose_num_blocks(None, [room], 0.9, 1) == 54 * GIB // (3 << 20)
    tight = dataclasses.replace(on_gpu(LLAMA_8B, host_free_bytes=20 * GIB), draft_block_bytes=1 << 20)
    assert choose_num_blocks(None, [tight], 0.9, 1) == 10 * GIB // (2 << 20)


def test_a_card_that_is_too_small_says_how_many_gib_are_missing() -> None:
    """0.9 · 16 - 15 - 1 = -1.6 GiB, and 128 blocks of 2 MiB are wanted: 1.85 GiB."""
    room = on_gpu(LLAMA_8B, total_bytes=16 * GIB, free_bytes=GIB, weight_bytes=15 * GIB, activation_bytes=GIB)
    with pytest.raises(
        InvalidConfiguration, match=r"cuda:0 of a is too small.* 1\.85 GiB are missing.*max_step_tokens"
    ):
        choose_num_blocks(None, [room], 0.9, 1)


def _drawn(seed: int) -> tuple[list[RankRoom], float]:
    """Cards of different sizes, one to three ranks on each, of one or two hosts."""
    chance = random.Random(seed)
    rooms = []
    for host in ["a", "b"][: chance.randint(1, 2)]:
        host_free = chance.randint(50, 900) * GIB
        for card in range(chance.randint(1, 3)):
            total, ranks = chance.randint(24, 192) * GIB, chance.randint(1, 3)
            weights = [chance.randint(1, total // (3 * ranks)) for _ in range(ranks)]
            free = total - sum(weights) - chance.randint(0, total // 4)
            for weight in weights:
                use = MemoryUse(f"cuda:{card}", total, free, weight, chance.randint(0, GIB), host_free)
                layout = dataclasses.replace(LLAMA_8B, num_layers=chance.randint(1, 61))
                rooms.append(RankRoom(host, use, layout, draft_block_bytes=chance.choice([0, 4321])))
    return rooms, chance.uniform(0.7, 1.0)


@pytest.mark.parametrize("seed", range(60))
def test_all_that_fits_and_no_block_more(seed: int) -> None:
    """Weights, activations and KV of all ranks on a card stay within its share and what was free, headroom kept; with
    one block more some memory would not hold them."""
    rooms, share = _drawn(seed)
    num_blocks = choose_num_blocks(None, rooms, share, 1)
    assert num_blocks * LLAMA_8B.block_tokens >= LEAST_TOKENS

    def fits(count: int) -> bool:
        good = True
        for host in {room.host for room in rooms}:
            here = [room for room in rooms if room.host == host]
            mirrors = count * sum(room.layout.block_bytes for room in here)
            good &= mirrors <= HOST_SHARE * here[0].use.host_free_bytes
            for device in {room.use.device for room in here}:
                ranks = [room for room in here if room.use.device == device]
                use = ranks[0].use
                grown = sum(count * room.block_bytes + room.use.activation_bytes for room in ranks)
                good &= grown <= use.free_bytes - HEADROOM * use.total_bytes
                good &= grown + sum(room.use.weight_bytes for room in ranks) <= share * use.total_bytes
        return good

    assert fits(num_blocks)
    assert not fits(num_blocks + 1)
    random.Random(seed).shuffle(rooms)
    assert choose_num_blocks(None, rooms, share, 1) == num_blocks


@pytest.mark.parametrize("seed", range(20))
def test_more_of_anything_never_makes_fewer_blocks(seed: int) -> None:
    rooms, share = _drawn(seed)
    num_blocks = choose_num_blocks(None, rooms, share, 1)
    roomier = [
        dataclasses.replace(room, use=dataclasses.replace(room.use, free_bytes=room.use.free_bytes + GIB))
        for room in rooms
    ]
    assert choose_num_blocks(None, roomier, share, 1) >= num_blocks
    assert choose_num_blocks(None, rooms, min(1.0, share + 0.05), 1) >= num_blocks
    lighter = [
        dataclasses.replace(room, use=dataclasses.replace(room.use, weight_bytes=room.use.weight_bytes // 2))
        for room in rooms
    ]
    assert choose_num_blocks(None, lighter, share, 1) >= num_blocks


def test_kv_memory_is_of_all_ranks() -> None:
    assert choose_num_blocks(13_440, [on_cpu(NARROW, "a", GIB), on_cpu(WIDE, "a", GIB)], 0.9, 1) == 10
    assert choose_num_blocks(13_440, [on_cpu(NARROW, "a", GIB)], 0.9, 1) == 26
    with pytest.raises(InvalidConfiguration, match="at least 2"):
        choose_num_blocks(2_687, [on_cpu(NARROW, "a", GIB), on_cpu(WIDE, "a", GIB)], 0.9, 1)


def test_kv_memory_that_a_card_does_not_have_is_refused() -> None:
    assert choose_num_blocks(61 * GIB, [on_gpu(LLAMA_8B)], 0.1, 1) == 61 * GIB // (2 << 20)
    with pytest.raises(InvalidConfiguration, match=r"3\.00 GiB are missing"):
        choose_num_blocks(64 * GIB, [on_gpu(LLAMA_8B)], 0.9, 1)
    with pytest.raises(InvalidConfiguration, match=r"host memory.*1\.00 GiB are missing"):
        choose_num_blocks(16 * GIB, [on_gpu(LLAMA_8B, host_free_bytes=15 * GIB)], 0.9, 1)


def test_kv_memory_that_a_host_does_not_have_is_refused() -> None:
    """Two ranks share what is free on theirs."""
    rooms = [on_cpu(WIDE, "a", 3 * GIB), on_cpu(WIDE, "a", 3 * GIB), on_cpu(WIDE, "b", 2 * GIB)]
    assert choose_num_blocks(4 * GIB, rooms, 0.9, 1) == 4 * GIB // (3 * WIDE.block_bytes)
    with pytest.raises(InvalidConfiguration, match=r"takes 4\.00 GiB of cpu of a, and 1\.00 GiB are missing"):
        choose_num_blocks(6 * GIB, rooms, 0.9, 1)


def test_of_a_cpu_a_tenth_of_the_shortest_memory() -> None:
    roomy, short = GIB, 4_000_000
    together = [on_cpu(NARROW, "a", short), on_cpu(WIDE, "a", short)]
    apart = [on_cpu(NARROW, "a", short), on_cpu(WIDE, "b", roomy)]
    assert choose_num_blocks(None, together, 0.9, 1) == 400_000 // (504 + 840)
    assert choose_num_blocks(None, apart, 0.9, 1) == 400_000 // 504
    assert choose_num_blocks(None, [on_cpu(NARROW, "a", 1_000_000)], 0.9, 1) == -(-LEAST_TOKENS // 7)
    assert choose_num_blocks(None, [on_cpu(NARROW, "a", roomy)], 0.9, 2) == -(-CPU_TOKENS // 14)
    with pytest.raises(InvalidConfiguration, match="cpu of a is too small"):
        choose_num_blocks(None, [on_cpu(NARROW, "a", 9_999)], 0.9, 1)


def test_what_the_memory_was_sized_from_is_said() -> None:
    rooms = [on_gpu(LLAMA_8B), on_gpu(LLAMA_8B, "cuda:1", free_bytes=30 * GIB)]
    assert [budget.num_blocks for budget in budgets(rooms, 0.9)] == [27_648, 12_288, 128_000]
    line = said(None, rooms, 0.9, 12_288, 1)
    for words in (
        "12288 blocks of 16 tokens, 196608 tokens",
        "KV 2 × 24576.0 MiB",
        "weights 2 × 16384.0 MiB",
        "activations 2 × 2048.0 MiB",
        "free before KV 64512.0, 30720.0 MiB",
        "24.00 GiB for KV in cuda:1 of a, engine.gpu_memory_share 0.9",
    ):
        assert words in line, line
    assert said(None, [on_cpu(NARROW, "a", GIB)], 0.9, 10, 2).endswith("10% of what is free, at most 32768 tokens")
    assert re.search(
        "20 blocks .*140 tokens.*activations not measured", said(7 << 20, [on_cpu(NARROW, "a", 1)], 1, 10, 2)
    )
    assert "sized from engine.kv_memory, 7.0 MiB" in said(7 << 20, [on_cpu(NARROW, "a", 1)], 0.9, 10, 2)
