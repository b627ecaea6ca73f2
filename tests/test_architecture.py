"""The arrows of the house: which room may import which. A wish for another arrow is a question of design."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS_0_TO_2 = {"spec", "scheduler", "kernels", "telemetry", "kvtransfer", "engine", "service", "legato.v1"}

# room -> rooms of ours that it may import
ARROWS: dict[str, set[str]] = {
    "spec": set(),
    "telemetry": set(),
    "scheduler": {"spec"},
    "kernels": set(),
    "kvtransfer": {"spec", "legato.v1", "kernels"},
    "engine": {"spec", "scheduler", "kernels"},
    "service": {"spec", "legato.v1", "telemetry"},
    "worker": FLOORS_0_TO_2,
    "prefill_svc": FLOORS_0_TO_2 | {"worker"},
    "decode_svc": FLOORS_0_TO_2 | {"worker"},
    "router": {"service", "legato.v1", "spec", "telemetry", "scheduler"},
    "legato.v1": set(),
}
# Subcommands import what they run, lazily; nothing else in legato/ sees more than the wire.
COMMAND_MAY_IMPORT = {"legato", "legato.v1", "service", "spec", "engine", "kernels", "kvtransfer", "telemetry"}

# third-party packages that a room never imports, anywhere; "file" entries lift the ban in that file alone
BANS: dict[str, set[str]] = {
    "spec": {"*"},
    "scheduler": {"*", "asyncio", "time", "datetime", "logging", "threading", "socket"},
    "kernels": {"grpc", "redis"},
    "kvtransfer": {"grpc", "redis"},
    "engine": {"grpc", "redis"},
    "service": {"torch"},
    "router": {"torch"},
    "legato": set(),
}
ALL_PRODUCT_ROOMS = [*ARROWS, "legato"]


def files_of(room: str) -> list[Path]:
    folder = ROOT / room.replace(".", "/")
    return [path for path in sorted(folder.rglob("*.py")) if room != "legato" or "legato/v1/" not in path.as_posix()]


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room_of(module: str) -> str | None:
    if module == "legato.v1" or module.startswith("legato.v1."):
        return "legato.v1"
    top = module.split(".")[0]
    return top if top in ARROWS or top == "legato" else None


@pytest.mark.parametrize("room", list(ARROWS))
def test_a_room_imports_only_what_its_arrows_allow(room: str) -> None:
    for path in files_of(room):
        for module in imports_of(path):
            target = room_of(module)
            if target == "legato" and module in ("legato",):
                continue  # the parent package of legato.v1 in `from legato.v1 import x`
            assert target in (None, room) or target in ARROWS[room], f"{path.relative_to(ROOT)} imports {module}"


def test_the_sdk_sees_only_the_wire() -> None:
    for path in files_of("legato"):
        allowed = COMMAND_MAY_IMPORT if "/command/" in path.as_posix() else {"legato", "legato.v1"}
        for module in imports_of(path):
            assert room_of(module) in (None, *allowed), f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize("room", list(BANS))
def test_a_room_stays_free_of_what_it_must_not_know(room: str) -> None:
    for path in files_of(room):
        for module in imports_of(path):
            top = module.split(".")[0]
            assert top not in BANS[room], f"{path.relative_to(ROOT)} imports {module}"
            if "*" in BANS[room]:
                ours = room_of(module) is not None
                assert ours or top in sys.stdlib_module_names, f"{path.relative_to(ROOT)} imports {module}"


def test_the_product_never_imports_transformers() -> None:
    for room in ALL_PRODUCT_ROOMS:
        for path in files_of(room):
            assert not any(module.split(".")[0] == "transformers" for module in imports_of(path)), path


@pytest.mark.parametrize("room", [room for room in ARROWS if room not in ("service",) and "svc" not in room])
def test_only_a_main_reads_the_environment(room: str) -> None:
    for path in files_of(room):
        if path.name == "__main__.py":
            continue
        source = path.read_text(encoding="utf-8")
        assert "os.environ" not in source and "getenv" not in source, f"{path.relative_to(ROOT)} reads the environment"


def _loaded(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import spec.model, spec.errors, spec.sampling, spec.layout",
        "import scheduler.plan, scheduler.blocks, scheduler.prefix, scheduler.batch, scheduler.handoff",
        "import kvtransfer.plan, kvtransfer.ticket, kvtransfer.transport",
        "import router.policy, router.journey, router.registry",
        "import legato; legato.Client",
    ],
)
def test_pure_rooms_load_no_torch(statement: str) -> None:
    assert "torch" not in _loaded(statement)


def test_the_wire_stays_light() -> None:
    loaded = _loaded("import legato")
    assert "grpc" not in loaded, "importing legato loads the client lazily"


def test_kernels_says_that_it_is_not_the_hub_package() -> None:
    import kernels

    assert kernels.__version__ == "0"


def test_tests_are_no_packages() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py")), "tests/kernels/__init__.py would steal the name kernels"
