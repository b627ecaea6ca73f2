"""Compiles kernels/cpu/*.cpp for this machine, once; the result is kept per user and shared by all processes.

    python -m kernels.cpu.build        builds ahead of time and says what it did

The file's name is a digest of the sources, the compiler, its flags and the processor's features: whatever of these
changes, the library is built again. Several processes that start at once build it once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE_FOLDER = Path(__file__).parent
COMPILERS = ("g++", "clang++", "c++")
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-pthread")


class BuildFailed(RuntimeError):
    """Says what is missing on this machine, or what the compiler answered."""


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides what comes out; `name` is its digest."""

    compiler: str
    flags: tuple[str, ...]
    name: str


def default_cache() -> Path:
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "legato"


def recipe(target: str = "native") -> Recipe:
    """`target` is the compiler's -march. Raises BuildFailed where no compiler is installed."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise BuildFailed(
            f"no C++ compiler found (looked for {', '.join(COMPILERS)}); Debian and Ubuntu: apt install g++"
        )
    flags = (*FLAGS, f"-march={target}")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256(repr((version, flags, platform.machine(), _processor_features())).encode())
    for path in _sources("*.h") + _sources("*.cpp"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return Recipe(compiler, flags, f"kernels-{digest.hexdigest()[:24]}.so")


def build(cache: Path | None = None, target: str = "native") -> Path:
    """The library's path, compiled first where it is not there yet. Raises BuildFailed."""
    made = recipe(target)
    folder = cache or default_cache()
    path = folder / made.name
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "build.lock"), tempfile.TemporaryDirectory(dir=folder, prefix="build-") as scratch:
            if not path.is_file():
                os.replace(_compile(made, Path(scratch)), path)
    except OSError as error:
        raise BuildFailed(f"cannot keep the compiled kernels in {folder}: {error}") from error
    return path


def _compile(made: Recipe, scratch: Path) -> Path:
    def run(*arguments: str) -> None:
        done = subprocess.run([made.compiler, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildFailed(f"{made.compiler} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")

    def compile_one(source: Path) -> Path:
        target = scratch / f"{source.stem}.o"
        run(*made.flags, "-c", str(source), "-o", str(target))
        return target

    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, _sources("*.cpp")))
    library = scratch / "kernels.so"
    run("-shared", "-pthread", "-o", str(library), *map(str, objects))
    return library


def _sources(pattern: str) -> list[Path]:
    return sorted(SOURCE_FOLDER.glob(pattern))


def _processor_features() -> str:
    """What -march=native depends on: a cache may be shared by machines that differ."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return "\n".join(
            sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
        )
    return platform.processor()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the system lets go of it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    try:
        made = recipe()
        path = default_cache() / made.name
        verb = "found" if path.is_file() else "built"
        print(f"{verb} {build()}\nwith {made.compiler} {' '.join(made.flags)}")
    except BuildFailed as error:
        print(f"the CPU kernels are not available: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
