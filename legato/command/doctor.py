"""`legato doctor`."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text

from legato.command import options, terminal

HELP = """Say what this machine has, and what to do about what is missing. Exit code 1 when a cluster cannot run here.

\b
  legato doctor
  legato doctor --model ./my-model --redis redis://localhost:6379
  legato doctor --json
"""
State = Literal["ok", "optional", "missing"]
MARKS = {"ok": Text("ok", "green"), "optional": Text("none", "yellow"), "missing": Text("MISSING", "red")}


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """`optional`: it is not there, and a cluster runs without. `advice` says what to do about it."""

    name: str
    state: State
    found: str
    advice: str = ""


def doctor(
    model: Annotated[str, typer.Option("--model", help="Folder, .gguf file, smollm2 or ORG/NAME.")] = "smollm2",
    redis: Annotated[str, typer.Option("--redis", metavar="URL", help="Instead of the embedded server.")] = "",
    as_json: options.AsJson = False,
) -> int:
    findings: list[Finding] = []
    checks: list[Callable[[], Iterator[Finding]]] = [
        *(_machine, _packages, _gpu, _kernels, _transports),
        lambda: _redis(redis),
        lambda: _model(model),
    ]
    table = Table("", "", "", "what to do", box=None, padding=(0, 2, 0, 0), show_header=False)
    with terminal.err.status("looking") if terminal.err.is_terminal else contextlib.nullcontext():
        for check in checks:
            for finding in check():
                findings.append(finding)
                table.add_row(finding.name, MARKS[finding.state], finding.found, Text(finding.advice, "bold"))
    missing = [finding for finding in findings if finding.state == "missing"]
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    else:
        terminal.out.print(table)
        verdict = f"{len(missing)} missing" if missing else "a cluster can run here: legato up"
        terminal.out.print(f"\n{verdict}", style="red" if missing else "green")
    return 1 if missing else 0


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    python = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {cores} cores"
    enough = sys.version_info >= (3, 11)
    yield Finding("machine", "ok" if enough else "missing", python, "" if enough else "Python 3.11 or newer is needed")
    free_bytes = shutil.disk_usage(Path.home()).free
    enough = free_bytes > 1 << 30
    advice = "" if enough else "a model and compiled kernels need about 1 GiB in the home folder"
    yield Finding("disk", "ok" if enough else "missing", f"{free_bytes / 2**30:.0f} GiB free", advice)


def _packages() -> Iterator[Finding]:
    wanted = ("torch", "numpy", "safetensors", "tokenizers", "gguf", "redis", "grpcio", "pydantic", "jinja2")
    lacking = []
    for name in wanted:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lacking.append(name)
    servers = [name for name in ("router", "prefill_svc", "decode_svc") if importlib.util.find_spec(name) is None]
    if servers:
        advice = "servers run from the source tree: pip install -e '.[serve]' in a checkout"
        yield Finding("servers", "missing", f"no {', '.join(servers)}", advice)
    if lacking:
        yield Finding("packages", "missing", f"no {', '.join(lacking)}", "pip install -e '.[serve]' in a checkout")
    else:
        yield Finding("packages", "ok", f"torch {importlib.metadata.version('torch')}")


def _gpu() -> Iterator[Finding]:
    try:
        import torch
    except ImportError:
        return
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("GPU", "ok", ", ".join(names))
        triton = importlib.util.find_spec("triton") is not None
        yield Finding("Triton", "ok" if triton else "missing", "", "" if triton else "pip install 'legato[gpu]'")
    else:
        device = Path("/dev/nvidia0").exists()
        advice = "a GPU is there, but this torch does not see it: install a CUDA build of torch" if device else ""
        yield Finding("GPU", "missing" if device else "optional", "the CPU computes", advice)


def _kernels() -> Iterator[Finding]:
    try:
        from kernels.cpu import build
    except ImportError:
        return
    try:
        made = build.recipe()
    except build.BuildFailed as error:
        yield Finding("CPU kernels", "optional", "torch's own operations, several times slower", str(error))
        return
    is_built = (build.default_cache() / made.name).is_file()
    found = "built" if is_built else "will be built at the first start"
    yield Finding("CPU kernels", "ok", f"{found}, by {made.compiler}")


def _transports() -> Iterator[Finding]:
    try:
        from kvtransfer.choose import probe
        from kvtransfer.probing import rdma_devices
    except ImportError:
        return
    devices = rdma_devices()
    yield Finding("RDMA", "ok" if devices else "optional", ", ".join(devices) or "no device: hosts are linked by TCP")
    for one in probe():
        if one.available:
            yield Finding(f"transport {one.name}", "ok", one.detail)
        else:
            yield Finding(f"transport {one.name}", "optional", "", one.detail)


def _redis(url: str) -> Iterator[Finding]:
    import asyncio
    import tempfile

    try:
        from legato.command.local import valkey
        from service.registry import check_redis
    except ImportError:
        return
    from spec.errors import InvalidConfiguration

    if url:
        try:
            asyncio.run(check_redis(url))
        except InvalidConfiguration as error:
            yield Finding("Redis", "missing", str(error), "start it, or leave --redis out")
        else:
            yield Finding("Redis", "ok", "answers")
        return
    try:
        with tempfile.TemporaryDirectory() as folder:
            valkey.prepare(0, Path(folder))
    except InvalidConfiguration as error:
        yield Finding("Redis", "missing", "", str(error))
    else:
        yield Finding("Redis", "ok", "embedded valkey-server")


def _must_be_fetched(name: str) -> bool:
    from service.model_source import DEFAULT_CACHE, SMOLLM2, SMOLLM2_FILE, SMOLLM2_MODULE

    if Path(name).expanduser().exists():
        return False
    if name == SMOLLM2:
        cached = (DEFAULT_CACHE.expanduser() / SMOLLM2 / SMOLLM2_FILE).is_file()
        return not cached and importlib.util.find_spec(SMOLLM2_MODULE) is None
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _model(name: str) -> Iterator[Finding]:
    try:
        from engine.model_files import open_model
        from service.model_source import resolve_model
        from service.tokenizer import load_tokenizer
    except ImportError:
        return
    from spec.errors import LegatoError

    try:
        if _must_be_fetched(name):
            yield Finding("model", "ok", f"{name} is fetched at the first start")
            return
        path = resolve_model(name)
        spec = open_model(path).spec
        chat = "chat template" if load_tokenizer(path).has_chat_template else "no chat template"
        size = f"{spec.num_parameters / 1e6:.0f} M parameters, context {spec.max_context_tokens}"
        yield Finding("model", "ok", f"{name}: {spec.family}, {size}, {chat}")
    except LegatoError as error:
        yield Finding("model", "missing", "", str(error))
