"""Building: once for all processes, kept by content, and a clear word where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.cpu import build as build_module
from kernels.cpu import library as library_module
from kernels.cpu.build import BuildFailed, build, recipe
from kernels.cpu.library import Library, library_for, shared_library, status

ROOT = Path(__file__).resolve().parents[2]
SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def small_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source that compiles in no time stands for the kernels."""
    try:
        recipe()
    except BuildFailed as error:
        pytest.skip(str(error))
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "small.cpp").write_text(SMALL)
    monkeypatch.setattr(build_module, "SOURCE_FOLDER", folder)
    return folder


def test_a_library_is_built_once_and_again_when_a_source_changes(small_source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert not status(cache).built
    first = build(cache)
    assert status(cache).built
    written = first.stat().st_mtime_ns
    assert build(cache) == first
    assert first.stat().st_mtime_ns == written
    (small_source / "small.cpp").write_text(SMALL.replace("42", "43"))
    assert build(cache) != first
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so", ".so"]


def test_processes_that_start_together_build_it_once(small_source: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; import kernels.cpu.build as b, subprocess\n"
        f"b.SOURCE_FOLDER = Path({str(small_source)!r})\n"
        "plain, calls = b._compile, []\n"
        "b._compile = lambda *a: (calls.append(1), plain(*a))[1]\n"
        f"b.build(Path({str(tmp_path / 'cache')!r})); print(len(calls))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    counts = [int(process.communicate(timeout=120)[0]) for process in started]
    assert sum(counts) == 1
    assert all(process.returncode == 0 for process in started)


def test_what_the_compiler_says_is_passed_on(small_source: Path, tmp_path: Path) -> None:
    (small_source / "small.cpp").write_text("this is no C++")
    with pytest.raises(BuildFailed, match="error"):
        build(tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["build.lock"]


def test_a_cache_that_cannot_be_written_is_named(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildFailed, match="cannot keep"):
        build(tmp_path / "file" / "cache")


def test_without_a_compiler_torch_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build_module.shutil, "which", lambda name: None)
    with pytest.raises(BuildFailed, match="apt install"):
        recipe()
    assert not status().available
    monkeypatch.setattr(library_module, "shared_library", shared_library.__wrapped__)
    assert library_for(torch.ones(1)) is None
    assert "no C++ compiler" in caplog.text


def test_other_dtypes_are_left_to_torch() -> None:
    assert library_for(torch.ones(1, dtype=torch.float16)) is None
    assert library_for(torch.ones(1), torch.ones(1, dtype=torch.float16)) is None


def test_every_byte_is_read(library: Library) -> None:
    words = torch.arange(64 * 8 * 10, dtype=torch.int32)
    assert library.read_bytes(words) == int(words.sum())
