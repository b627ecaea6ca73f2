"""compose.yaml, the collector's configuration and the Dockerfile, as far as they can be checked without an engine."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from service.config import RouterConfig, WorkerConfig, load

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "legato:0.1.0"
COMMANDS = {
    ("python", "-m", "router"): RouterConfig,
    ("python", "-m", "prefill_svc"): WorkerConfig,
    ("python", "-m", "decode_svc"): WorkerConfig,
}
Project = Callable[..., dict[str, Any]]


def seconds(duration: str) -> float:
    """Compose writes "1m30s"."""
    return sum(
        float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall(r"([\d.]+)([hms])", duration)
    )


def ours(project: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: service for name, service in project["services"].items() if service["image"] == IMAGE}


def configuration(service: dict[str, Any]) -> Any:
    """What its `__main__` makes of the environment; a worker's knows its role."""
    role = {"LEGATO_ROLE": "prefill"} if service["command"][-1] != "router" else {}
    return load(COMMANDS[tuple(service["command"])], None, {**service["environment"], **role})


def test_the_real_compose_takes_it_and_wants_a_key(compose: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert compose("config", "-q", LEGATO_CLUSTER_KEY="x" * 8).returncode == 0
    without = compose("config", "-q")
    assert without.returncode != 0
    assert "LEGATO_CLUSTER_KEY" in without.stderr


def test_who_is_there(project: Project) -> None:
    read = project()
    commands = [service["command"][-1] for service in ours(read).values()]
    assert sorted(commands) == ["decode_svc", "decode_svc", "prefill_svc", "prefill_svc", "router"]
    assert set(read["services"]) - set(ours(read)) == {"redis", "otel-collector", "jaeger"}
    assert IMAGE.endswith(re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1])  # type: ignore[index]


def test_every_service_starts_from_its_environment_alone(project: Project) -> None:
    """The environment is a whole configuration, and each worker is told apart and found under its own name."""
    read = project(LEGATO_ENGINE__THREADS="3", LEGATO_MODEL="org/name", LEGATO_API_KEYS="one,two")
    ids = set()
    for name, service in ours(read).items():
        config = configuration(service)
        assert config.host == "0.0.0.0"
        assert config.cluster_key.get_secret_value() == "a key for tests"
        if isinstance(config, RouterConfig):
            assert [key.get_secret_value() for key in config.api_keys] == ["one", "two"]
            continue
        assert (config.advertise, config.worker_id) == (name, name)
        assert (config.engine.threads, config.engine.model) == (3, "org/name")
        ids.add(config.worker_id)
    assert len(ids) == 4


def test_addresses_lead_to_services_that_listen_there(project: Project) -> None:
    read = project()
    collector = yaml.safe_load((ROOT / "deploy/otel-collector.yaml").read_text())
    otlp_port = int(collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].rsplit(":", 1)[1])
    listeners = {("redis", 6379), ("otel-collector", otlp_port), ("jaeger", 4317)}
    for service in ours(read).values():
        config = configuration(service)
        for url in (config.redis_url, config.telemetry.otlp_endpoint):
            assert (urlsplit(url).hostname, urlsplit(url).port) in listeners, url
    exporter = collector["exporters"]["otlp_grpc/jaeger"]["endpoint"]
    assert tuple(exporter.split(":")) in {(host, str(port)) for host, port in listeners}
    assert [port["target"] for port in read["services"]["router"]["ports"]] == [
        configuration(read["services"]["router"]).port
    ]


def test_the_collectors_configuration_hangs_together(project: Project) -> None:
    collector = yaml.safe_load((ROOT / "deploy/otel-collector.yaml").read_text())
    assert set(collector) == {"receivers", "processors", "exporters", "service"}
    pipelines = collector["service"]["pipelines"]
    assert set(pipelines) == {"traces", "metrics"}
    for kind in ("receivers", "processors", "exporters"):
        used = {component for pipeline in pipelines.values() for component in pipeline[kind]}
        assert used == set(collector[kind]), "what is declared is used, and the other way round"
    [mount] = read_mounts = project()["services"]["otel-collector"]["volumes"]
    assert (ROOT / mount["source"]).resolve() == ROOT / "deploy/otel-collector.yaml", read_mounts
    assert project()["services"]["otel-collector"]["command"] == [f"--config={mount['target']}"]


def test_images_are_pinned(project: Project) -> None:
    for name, service in project()["services"].items():
        assert re.fullmatch(r"[a-z/-]+:\d+\.\d+\.\d+(-alpine)?", service["image"]), name


def test_one_service_builds_the_image_and_the_others_take_it(project: Project) -> None:
    read = project(PIP_OPTIONS="--no-index")
    built = {name: service["build"] for name, service in read["services"].items() if "build" in service}
    assert {name: build["args"] for name, build in built.items()} == {"router": {"PIP_OPTIONS": "--no-index"}}
    policies = {name: service["pull_policy"] for name, service in ours(read).items()}
    assert policies == {name: "build" if name == "router" else "never" for name in policies}


def test_order_health_and_end(project: Project) -> None:
    read = project()
    assert "healthcheck" in read["services"]["redis"]
    for name, service in ours(read).items():
        assert service["depends_on"]["redis"]["condition"] == "service_healthy", name
        assert service["healthcheck"]["test"][0] == "CMD-SHELL"
        assert service["init"] is True
        # the drain, the server's second, the spans' and the metrics' two
        assert seconds(service["stop_grace_period"]) >= configuration(service).drain_s + 1 + 4
        assert seconds(service["healthcheck"]["start_period"]) >= 600, "a model is fetched"


def test_all_see_the_same_files_and_may_write_the_cache(project: Project) -> None:
    """The router reads the tokenizer from the path that a worker tells."""
    read = project()
    mounts = {name: {mount["target"]: mount for mount in service["volumes"]} for name, service in ours(read).items()}
    assert all(each == mounts["router"] for each in mounts.values())
    assert mounts["router"]["/models"]["read_only"]
    assert mounts["router"]["/home/legato/.cache"]["type"] == "volume"
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert "--owner=legato --group=legato /home/legato/.cache" in dockerfile, "a new volume takes the image's owner"
    given = project(MODELS_FOLDER="./mine")["services"]["router"]["volumes"]
    assert {mount["target"]: mount["type"] for mount in given}["/models"] == "bind"


def test_workers_share_memory_in_an_ipc_namespace_that_outlives_each_of_them(project: Project) -> None:
    services = project()["services"]
    workers = [service for service in ours(project()).values() if service["command"][-1] != "router"]
    assert {service["ipc"] for service in workers} == {"service:redis"}
    assert services["redis"]["ipc"] == "shareable"
    assert int(services["redis"]["shm_size"]) >= 4 * (16 << 20)


def test_the_image_holds_what_it_copies_and_no_secret() -> None:
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert ".*" in ignored, ".env with the cluster's key, .git, .venv"
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.MULTILINE) for word in line.split()[:-1]
    ]
    for path in copied:
        assert (ROOT / path).exists(), path
        assert path.rstrip("/") not in ignored
    rooms = {
        "spec",
        "scheduler",
        "kernels",
        "kvtransfer",
        "engine",
        "telemetry",
        "service",
        "worker",
        "legato",
        "deploy",
    }
    assert not (rooms | {"router", "prefill_svc", "decode_svc"}) & set(ignored)
    assert re.search(r"^USER legato$", dockerfile, re.MULTILINE)
