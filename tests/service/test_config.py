"""Configuration from YAML and LEGATO_* variables; every mistake is told with its path."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service import config
from spec.errors import InvalidConfiguration

WORKER = {"LEGATO_ROLE": "prefill", "LEGATO_REDIS_URL": "redis://127.0.0.1", "LEGATO_CLUSTER_KEY": "0123456789"}


def worker(**environment: str) -> config.WorkerConfig:
    return config.load(config.WorkerConfig, None, WORKER | environment)


def test_the_environment_goes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("role: decode\nengine:\n  threads: 3\n  kv_memory: 1GiB\n  block_tokens: 8\n")
    read = config.load(
        config.WorkerConfig, file, WORKER | {"LEGATO_ENGINE__THREADS": "2", "PATH": "x", "LEGATO_PORT": ""}
    )
    assert (read.role, read.engine.threads, read.engine.block_tokens) == ("prefill", 2, 8)
    assert read.engine.kv_memory == 1 << 30
    assert read.port == 0
    assert read.cluster_key.get_secret_value() == "0123456789"
    assert "0123456789" not in repr(read)


def test_lists_and_sizes_in_variables() -> None:
    read = worker(LEGATO_HANDOFF__TRANSPORTS="sockets, ucx", LEGATO_ENGINE__KV_MEMORY="512MiB")
    assert read.handoff.transports == ("sockets", "ucx")
    assert read.engine.kv_memory == 512 << 20
    assert worker(LEGATO_ENGINE__KV_MEMORY="4096").engine.kv_memory == 4096


def test_adapters_in_a_file_and_in_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text("engine:\n  adapters:\n    poems: /lora/poems\n    v2.1: prose\n")
    read = config.load(config.WorkerConfig, file, WORKER)
    assert read.engine.adapters == {"poems": "/lora/poems", "v2.1": "prose"}
    saved = tmp_path / "saved.yaml"
    config.save(read, saved)
    assert config.load(config.WorkerConfig, saved, {}) == read
    read = config.load(config.WorkerConfig, file, WORKER | {"LEGATO_ENGINE__ADAPTERS": "a=x/y=z, b = ~/b ,"})
    assert read.engine.adapters == {"a": "x/y=z", "b": "~/b"}


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        (
            "LEGATO_ENGINE__BLOCK_TOKES",
            ["engine.block_tokes", "LEGATO_ENGINE__BLOCK_TOKES", "mean engine.block_tokens?"],
        ),
        ("LEGATO_ENGIN__THREADS", ["engin", "mean engine?"]),
        ("LEGATO_BLOCK_TOKENS", ["block_tokens", "mean engine.block_tokens?"]),
        ("LEGATO_ZZZZ", ["unknown key zzzz"]),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_known_one(variable: str, words: list[str]) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        worker(**{variable: "1"})
    assert all(word in str(caught.value) for word in words)
    assert ("did you mean" in str(caught.value)) == (len(words) > 1)


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("ENGINE__BLOCK_TOKENS", "0", "engine.block_tokens"),
        ("ENGINE__THREADS", "-1", "engine.threads"),
        ("ENGINE__DTYPE", "float8", "engine.dtype"),
        ("ENGINE__DEVICE", "gpu", "engine.device"),
        ("ENGINE__KV_MEMORY", "lots", "engine.kv_memory"),
        ("ENGINE__ADAPTERS", "poems", "engine.adapters"),
        ("ENGINE__ADAPTERS", "a=x,a=y", "engine.adapters"),
        ("ENGINE__ADAPTERS", "no@name=x", "engine.adapters.no@name"),
        ("ENGINE__ADAPTERS", "a=", "engine.adapters.a"),
        ("HANDOFF__LEASE_S", "0", "handoff.lease_s"),
        ("HANDOFF__LEASE_S", "nan", "handoff.lease_s"),
        ("HANDOFF__TRANSPORTS", "ucx,pigeon", "handoff.transports"),
        ("PORT", "65536", "port"),
        ("ROLE", "both", "role"),
        ("REDIS_URL", "http://x", "redis_url"),
        ("WORKER_ID", "no spaces here", "worker_id"),
        ("TELEMETRY__LOG_LEVEL", "chatty", "telemetry.log_level"),
    ],
)
def test_a_value_out_of_range_is_told_with_its_path(key: str, value: str, path: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        worker(**{f"LEGATO_{key}": value})
    assert path in str(caught.value)
    assert f"LEGATO_{key}" in str(caught.value)


@pytest.mark.parametrize("value", ["-5", "-1GiB", "lots", "5 parrots", "1e3", "nan", "512 MiB of it", "0x10", "٣"])
@pytest.mark.parametrize("key", ["ENGINE__KV_MEMORY", "HANDOFF__LAYER_GROUP_BYTES"])
def test_what_is_no_size_is_told_with_what_is_one(key: str, value: str) -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        worker(**{f"LEGATO_{key}": value})
    said = str(caught.value)
    path = key.lower().replace("__", ".")
    assert said.startswith(f"{path} (LEGATO_{key}): ")
    assert '"512MiB"' in said and "whole number of bytes" in said and "GiB" in said
    assert said.endswith(f"is {value!r}")


@pytest.mark.parametrize("value", ["-5", "true", "1.5", "[1]", "{}", ".nan"])
def test_what_is_no_size_in_a_file(value: str, tmp_path: Path) -> None:
    file = tmp_path / "worker.yaml"
    file.write_text(f"engine: {{kv_memory: {value}}}\n")
    with pytest.raises(InvalidConfiguration, match=r"engine\.kv_memory: must be a whole number of bytes"):
        config.load(config.WorkerConfig, file, WORKER)


@pytest.mark.parametrize(("value", "expected"), [("4 GiB", 4 << 30), ("1.5MiB", 3 << 19), ("2gb", 2 * 10**9)])
def test_sizes_of_several_forms(value: str, expected: int) -> None:
    assert worker(LEGATO_ENGINE__KV_MEMORY=value).engine.kv_memory == expected


def test_secrets_are_not_told() -> None:
    with pytest.raises(InvalidConfiguration) as caught:
        worker(LEGATO_CLUSTER_KEY="s3cret", LEGATO_REDIS_URL="hunter2@host")
    assert "cluster_key" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_what_is_required_is_named() -> None:
    with pytest.raises(InvalidConfiguration, match=r"role is required.*redis_url is required.*cluster_key is required"):
        config.load(config.WorkerConfig, None, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("role: prefill\nengine: [1, 2\n", "line 3"),
        ("engine:\n  threads: 1\n  threads: 2\n", "line 3: the key 'threads' is given twice"),
        ("- role\n", "list"),
        ("engine: 5\n", "engine"),
        ("a: !!python/object/apply:os.system ['true']\n", "line 1"),
        (b"\xff\xfe\xff", "UTF-8"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str | bytes, words: str) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidConfiguration) as caught:
        config.load(config.RouterConfig, file, {})
    assert words in str(caught.value)
    assert "wrong.yaml" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfiguration, match=r"absent\.yaml cannot be read: No such file"):
        config.load(config.RouterConfig, tmp_path / "absent.yaml", {})


def test_a_section_cannot_be_set_inside_a_value(tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("cluster: here\n")
    with pytest.raises(InvalidConfiguration, match="LEGATO_CLUSTER__NAME sets a key inside cluster"):
        config.load(config.RouterConfig, file, {"LEGATO_CLUSTER__NAME": "x"})


def test_configurations_are_frozen() -> None:
    read: Any = worker()
    with pytest.raises(ValidationError):
        read.port = 1


def test_a_cluster_derives_its_processes(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "prefill: 2\nport: 1234\nengine: {max_step_tokens: 100, threads: 1}\nprefill_engine: {max_step_tokens: 256}\n"
        "api_keys: [abc]\ndecode_engine: {kv_memory: 1MiB}\ntelemetry: {log_level: debug}\n"
    )
    cluster = config.load(config.ClusterConfig, file, {"LEGATO_MODEL": "/models/x"}).resolve("redis://127.0.0.1:7777")
    workers, router = cluster.workers(), cluster.router()
    assert [each.worker_id for each in workers] == ["prefill-0", "prefill-1", "decode-0"]
    assert [each.engine.max_step_tokens for each in workers] == [256, 256, 100]
    assert [each.engine.kv_memory for each in workers] == [None, None, 1 << 20]
    assert {each.engine.model for each in workers} == {"/models/x"}
    assert {each.engine.gpu_memory_share for each in workers} == {0.9 / 3}
    assert {each.engine.threads for each in workers} == {1}
    assert {each.telemetry.log_level for each in [*workers, router]} == {"debug"}
    assert {each.redis_url for each in [*workers, router]} == {"redis://127.0.0.1:7777"}
    assert len({each.cluster_key.get_secret_value() for each in [*workers, router]}) == 1
    assert (router.port, router.api_keys[0].get_secret_value()) == (1234, "abc")
    for number, each in enumerate([*workers, router, cluster]):
        saved = tmp_path / f"{number}.yaml"
        config.save(each, saved)
        assert config.load(type(each), saved, {}) == each
        assert stat.S_IMODE(saved.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("decode_engine: {dtype: float32}\n", "dtype must be the same in both pools"),
        ("engine: {model: other}\n", "a cluster serves one model"),
        ("prefill: 0\n", "prefill"),
        ("prefill_engine: {thread: 1}\n", "prefill_engine.thread; did you mean prefill_engine.threads?"),
    ],
)
def test_a_cluster_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(InvalidConfiguration) as caught:
        config.load(config.ClusterConfig, file, {})
    assert words in str(caught.value)


def test_children_do_not_inherit_overrides() -> None:
    assert config.without_overrides({"LEGATO_PORT": "1", "PATH": "/bin"}) == {"PATH": "/bin"}
