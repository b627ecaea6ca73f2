"""Tiers as stores: what comes out is what went in, or nothing; files survive the process and nothing else does."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.config import KVTiersConfig
from spec.errors import InvalidConfiguration
from tests.support.memory_worker import make_worker, model_layout
from worker.tier_files import HEADER_BYTES, DiskTier
from worker.tiers import HostTier, Tier, open_tiers, owner_of

OWNER, OTHER = b"o" * 32, b"p" * 32
BLOCK_BYTES = 1000 + 37


def key(number: int) -> bytes:
    return hashlib.blake2b(bytes([number]), digest_size=32).digest()


def content(number: int) -> torch.Tensor:
    return torch.randint(0, 256, (BLOCK_BYTES,), generator=torch.Generator().manual_seed(number)).to(torch.uint8)


def disk(folder: Path, blocks: int = 4, owner: bytes = OWNER) -> DiskTier:
    return DiskTier(str(folder), blocks * (BLOCK_BYTES + HEADER_BYTES), owner)


def path_of(folder: Path, number: int, slot: int = 0) -> Path:
    return folder / str(slot) / key(number).hex()


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_what_comes_out_is_what_went_in_and_the_least_used_goes_first(kind: str, tmp_path: Path) -> None:
    tier: Tier = HostTier(4 * BLOCK_BYTES + 5) if kind == "host" else disk(tmp_path)
    assert tier.name == kind
    for number in range(4):
        assert tier.store(key(number), content(number))
    assert not tier.store(key(3), content(3))
    assert tier.use(key(0))
    assert tier.store(key(4), content(4))
    assert [tier.use(key(number)) for number in range(6)] == [True, False, True, True, True, False]
    for number in (0, 2, 3, 4):
        found = tier.load(key(number))
        assert found is not None
        assert torch.equal(found, content(number))
    assert tier.load(key(1)) is None
    assert not tier.store(key(9), torch.zeros(5 * BLOCK_BYTES, dtype=torch.uint8)), "it can never fit"
    assert tier.dropped == 0
    tier.close()


def test_a_later_start_finds_its_files_and_only_as_many_as_may_be(tmp_path: Path) -> None:
    first = disk(tmp_path)
    for number in range(4):
        first.store(key(number), content(number))
    first.close()
    (tmp_path / "0" / f"{key(7).hex()}.unfinished").write_bytes(b"half")
    again = disk(tmp_path, blocks=2)
    kept = [number for number in range(4) if again.use(key(number))]
    assert len(kept) == 2
    assert all(torch.equal(again.load(key(number)), content(number)) for number in kept)  # type: ignore[arg-type]
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == sorted(
        ["lock", *(key(number).hex() for number in kept)]
    )
    assert again.dropped == 0
    again.close()


def test_workers_that_share_a_folder_share_no_file(tmp_path: Path) -> None:
    first, second = disk(tmp_path), disk(tmp_path, owner=OTHER)
    first.store(key(1), content(1))
    second.store(key(1), content(2))
    assert torch.equal(first.load(key(1)), content(1))  # type: ignore[arg-type]
    first.close()
    second.close()
    back = disk(tmp_path, owner=OTHER)
    assert torch.equal(back.load(key(1)), content(2))  # type: ignore[arg-type]
    third = disk(tmp_path, owner=b"q" * 32)  # another model, which takes the free folder over
    assert (third.load(key(1)), third.dropped) == (None, 1)
    assert not path_of(tmp_path, 1).exists()
    back.close()
    third.close()


def _flip(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


WRONG: dict[str, Callable[[bytes], bytes]] = {
    "a flipped bit": _flip(HEADER_BYTES + 500),
    "a flipped last bit": _flip(HEADER_BYTES + BLOCK_BYTES - 1),
    "a flipped checksum": _flip(HEADER_BYTES - 1),
    "another format": _flip(8),
    "another model": _flip(12),
    "another prefix": _flip(12 + 32),
    "another size": _flip(12 + 64),
    "no header": lambda data: data[: HEADER_BYTES - 3],
    "truncated": lambda data: data[:-1],
    "no content": lambda data: data[:HEADER_BYTES],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"x",
    "zeroes": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("restarted", [False, True])
def test_a_file_that_is_wrong_is_removed_counted_and_never_handed_out(
    tmp_path: Path, what: str, restarted: bool
) -> None:
    tier = disk(tmp_path)
    tier.store(key(1), content(1))
    tier.store(key(2), content(2))
    if restarted:
        tier.close()
    path = path_of(tmp_path, 1)
    path.write_bytes(WRONG[what](path.read_bytes()))
    if restarted:
        tier = disk(tmp_path)
    assert tier.load(key(1)) is None
    assert tier.dropped == 1
    assert not path.exists()
    assert torch.equal(tier.load(key(2)), content(2))  # type: ignore[arg-type]
    assert tier.store(key(1), content(1)), "it can be kept again"
    assert torch.equal(tier.load(key(1)), content(1))  # type: ignore[arg-type]
    tier.close()


def test_a_file_of_our_name_that_is_none_of_ours_is_removed_at_start_and_no_other(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.store(key(1), content(1))
    tier.close()
    path_of(tmp_path, 1).rename(path_of(tmp_path, 2))  # the content of another prefix
    kept = ["note.txt", "notes.unfinished", key(3).hex().upper(), key(3).hex()[:-2]]
    for name in kept:
        (tmp_path / "0" / name).write_text("mine")
    (tmp_path / "0" / key(4).hex()).mkdir()
    tier = disk(tmp_path)
    assert tier.dropped == 1
    assert not tier.use(key(2))
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == sorted(["lock", key(4).hex(), *kept])
    tier.close()


@pytest.mark.parametrize("lock", [None, b"", b"o" * 31, b"o" * 33])
def test_a_folder_that_never_was_ours_is_left_as_it_is(tmp_path: Path, lock: bytes | None) -> None:
    theirs = {key(5).hex(): b"mine", "thesis.txt": b"too"} | ({} if lock is None else {"lock": lock})
    (tmp_path / "0").mkdir()
    for name, data in theirs.items():
        (tmp_path / "0" / name).write_bytes(data)
    for _ in range(2):
        tier = disk(tmp_path)
        tier.store(key(1), content(1))
        assert tier.dropped == 0
        tier.close()
        assert path_of(tmp_path, 1, slot=1).exists()
        assert {path.name: path.read_bytes() for path in (tmp_path / "0").iterdir()} == theirs


def test_a_file_that_went_away_is_not_here(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.store(key(1), content(1))
    path_of(tmp_path, 1).unlink()
    assert tier.load(key(1)) is None
    assert not tier.use(key(1))
    assert tier.dropped == 0
    tier.close()


def test_a_disk_that_takes_nothing_stops_nobody(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    folder = tmp_path / "0"
    folder.rename(tmp_path / "away")
    assert not tier.store(key(1), content(1))
    assert not tier.use(key(1))
    (tmp_path / "away").rename(folder)
    assert tier.store(key(1), content(1))
    tier.close()


def test_a_file_that_cannot_be_removed_stays_counted_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = disk(tmp_path, blocks=2)
    for number in (1, 2):
        assert tier.store(key(number), content(number))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted")

    def kept() -> list[str]:
        return sorted(path.name for path in (tmp_path / "0").iterdir())

    files = sorted(["lock", key(1).hex(), key(2).hex()])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        assert not tier.store(key(3), content(3))
        assert not tier.use(key(3)), "as store() said"
        for number in (1, 2):
            assert torch.equal(tier.load(key(number)), content(number))  # type: ignore[arg-type]
        assert kept() == files
        path_of(tmp_path, 1).write_bytes(b"wrong")
        assert tier.load(key(1)) is None
        assert (tier.dropped, kept()) == (0, files)
    assert tier.store(key(3), content(3))
    assert torch.equal(tier.load(key(3)), content(3))  # type: ignore[arg-type]
    assert kept() == sorted(["lock", key(2).hex(), key(3).hex()])
    tier.close()


def test_a_file_that_cannot_be_read_now_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = disk(tmp_path)
    tier.store(key(1), content(1))

    def refuse(path: Path, mode: str) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        assert tier.load(key(1)) is None
    assert torch.equal(tier.load(key(1)), content(1))  # type: ignore[arg-type]
    tier.close()


def test_a_folder_that_cannot_be_used_is_said_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfiguration, match=r"disk_folder .*file"):
        disk(tmp_path / "file")


def test_none_is_open_where_none_is_configured(tmp_path: Path) -> None:
    ranks = make_worker(model_layout()).ranks
    assert open_tiers(KVTiersConfig(), "m", ranks) == ()
    config = KVTiersConfig(host_bytes=10, disk_folder=str(tmp_path), disk_bytes=10)
    opened = open_tiers(config, "m", ranks)
    assert [tier.name for tier in opened] == ["host", "disk"]
    for tier in opened:
        tier.close()


def test_an_owner_is_model_and_what_ranks_hold_wherever_it_lies() -> None:
    layout = model_layout(num_layers=4, heads=2)
    owners = [
        owner_of(model, make_worker(whole, tp=tp, num_blocks=blocks, seed=blocks).ranks)
        for model, whole, tp, blocks in (
            ("m", layout, 1, 9),
            ("m2", layout, 1, 9),
            ("m", model_layout(num_layers=4, heads=4), 1, 9),
            ("m", model_layout(num_layers=4, heads=2, block_tokens=8), 1, 9),
            ("m", layout, 2, 9),
        )
    ]
    assert len(set(owners)) == 5
    assert owner_of("m", make_worker(layout, tp=2, num_blocks=5, seed=5).ranks) == owners[4]


def test_the_header_is_as_the_page_says(tmp_path: Path) -> None:
    import xxhash

    tier = disk(tmp_path)
    tier.store(key(1), content(1))
    data = path_of(tmp_path, 1).read_bytes()
    fields = struct.pack("<8sI32s32sQ", b"LEGATOKV", 1, OWNER, key(1), BLOCK_BYTES)
    payload = bytes(content(1).tolist())
    assert data == fields + xxhash.xxh3_128(fields + payload).digest() + payload
    tier.close()
