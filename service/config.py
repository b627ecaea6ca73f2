"""What an operator may set: one small frozen model per process, resolved once, at start.

    load(WorkerConfig, path, environment)      YAML file, then LEGATO_* variables over it: LEGATO_ENGINE__THREADS=2
    save(config, path)                         what `legato up` hands to the processes it starts

An unknown key and a value out of range raise InvalidConfiguration with the key's path.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    field_validator,
    model_validator,
)

from service.config_source import ENVIRONMENT_PREFIX, load
from spec.errors import InvalidConfiguration
from spec.layout import ParallelLayout

__all__ = [
    "ClusterConfig",
    "EngineConfig",
    "HandoffConfig",
    "KVTiersConfig",
    "RouterConfig",
    "TelemetryConfig",
    "WorkerConfig",
    "load",
    "save",
    "to_yaml",
    "without_overrides",
]


def _split(value: object) -> object:
    """A list given as one string, as in an environment variable: "ucx,sockets"."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _folders(value: object) -> object:
    """A mapping given as one string, as in an environment variable: "name=folder,name2=folder2"."""
    if not isinstance(value, str):
        return value
    folders: dict[str, str] = {}
    for part in (part.strip() for part in value.split(",") if part.strip()):
        name, separator, folder = (piece.strip() for piece in part.partition("="))
        if not separator or name in folders:
            raise ValueError("must be name=folder, several with commas between, each name once")
        folders[name] = folder
    return folders


def _size(value: object) -> object:
    """What ByteSize reads, without what it also takes for one: a fraction of a byte, True, bits."""
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not is_number and not (isinstance(value, str) and _SIZE.fullmatch(value)):
        raise ValueError('must be a whole number of bytes, or one with KiB, MiB, GiB, TiB, KB, MB, GB or TB: "512MiB"')
    return value


def _redis_url(value: str) -> str:
    if not value.startswith(("redis://", "rediss://", "unix://")):
        raise ValueError("must be a redis://, rediss:// or unix:// URL")
    return value


_SIZE = re.compile(r"\s*(\d+|\d+(\.\d+)?\s*[KMGT]I?B)\s*", re.ASCII | re.IGNORECASE)
Size = Annotated[ByteSize, BeforeValidator(_size)]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Folder = Annotated[str, Field(min_length=1)]
ClusterKey = Annotated[SecretStr, Field(min_length=8)]
# Largest message a server or a client takes: a prompt of a million tokens with its log-probabilities fits.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class EngineConfig(Section):
    """What a worker computes with."""

    model: str = Field(default="smollm2", min_length=1)  # a name service/model_source.py resolves, or a path
    draft_model: str | None = Field(default=None, min_length=1)  # guesses for `model`; the same vocabulary, and smaller
    adapters: Annotated[dict[Name, Folder], BeforeValidator(_folders)] = {}  # LoRA, as PEFT writes it; by name
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8", "float8_e4m3"] = "auto"  # auto: dtype
    quantisation: Literal["auto", "none", "int8", "int4", "fp8"] = "auto"  # of the weights; auto: as they are stored
    activations: Literal["kept", "stored"] = "kept"  # stored: rounded to FP8 where the model's files say so
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    layout: str = "tp1"  # of the worker's ranks, a process each: "tp2", "pp2-tp2", "dp2-ep2", "dp2-stage"
    threads: Count | None = None  # of each rank; None: the engine decides, or the host's cores shared out
    block_tokens: Annotated[int, Field(ge=1, le=1024)] = 16
    kv_memory: Size | None = None  # of all ranks; bytes, or "512MiB"; None: from what is free
    gpu_memory_share: Annotated[float, Field(gt=0, le=1)] = 0.9  # of each GPU: weights, activations and KV
    max_step_tokens: Count = 512  # a step computes at most this many: the chunk size
    max_sequences: Count = 64  # running at once
    max_context_tokens: Count | None = None  # None: the model's
    cuda_graphs: Literal["auto", "off"] = "auto"  # auto: on a GPU, where the host need not wait for it within a step
    micro_batches: Count | None = None  # steps that are on their way through the stages; None: one a stage
    expert_replicas: Annotated[int, Field(ge=0)] = 0  # more of each layer's experts, by load; where ep spreads them
    rank_timeout_s: Seconds = 30.0  # a rank that keeps the others waiting for longer is lost

    @field_validator("layout")
    @classmethod
    def _is_a_layout(cls, layout: str) -> str:
        try:
            return str(ParallelLayout.parse(layout))
        except InvalidConfiguration as error:
            raise ValueError(error.message) from None


class HandoffConfig(Section):
    transports: Annotated[tuple[Literal["ucx", "sockets"], ...], BeforeValidator(_split), Field(min_length=1)] = (
        "ucx",
        "sockets",
    )  # best first
    lease_s: Seconds = 5.0  # a reservation ends this long after the last sign of progress
    digest: Literal["always", "sampled", "off"] = "always"  # of what comes in here
    digest_sample: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of the chunks, where digest is sampled
    # While a chunk is computed its layers leave in groups of so many bytes, or in fewer and larger ones.
    layer_group_bytes: Annotated[Size, Field(ge=1)] = ByteSize(1024 * 1024)

    @property
    def digest_share(self) -> float:
        return {"always": 1.0, "sampled": self.digest_sample, "off": 0.0}[self.digest]


class KVTiersConfig(Section):
    """Where copies of KV blocks are kept after their memory was given to others."""

    host_bytes: Size = ByteSize(0)  # of host memory; bytes, or "4GiB"; 0: none
    disk_folder: Folder | None = None  # None: none on disk; workers of one host may share it
    disk_bytes: Size = ByteSize(0)  # of files of this worker

    @model_validator(mode="after")
    def _disk_has_folder_and_size(self) -> KVTiersConfig:
        if (self.disk_folder is None) != (self.disk_bytes == 0):
            raise ValueError("disk_folder and disk_bytes go together: set both, or neither")
        return self


class TelemetryConfig(Section):
    otlp_endpoint: str | None = None  # "http://host:4317"; None: no traces and no metrics leave the process
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    service_name: str | None = None  # None: the process names itself, e.g. "legato-router"


class WorkerConfig(Section):
    role: Literal["prefill", "decode"]
    worker_id: Name | None = None  # None: drawn at start
    host: str = "127.0.0.1"
    port: Port = 0  # 0: a free one
    advertise: str | None = None  # host or host:port that peers reach it by; None: what it is bound to
    redis_url: Annotated[str, BeforeValidator(_redis_url)]
    cluster: Name = "legato"
    cluster_key: ClusterKey
    registration_lease_s: Seconds = 5.0
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 8.0
    engine: EngineConfig = EngineConfig()
    handoff: HandoffConfig = HandoffConfig()
    kv_tiers: KVTiersConfig = KVTiersConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @model_validator(mode="after")
    def _steps_hold_every_sequence(self) -> WorkerConfig:
        _check_step(self.engine)
        return self


class RouterConfig(Section):
    router_id: Name | None = None  # None: drawn at start
    host: str = "127.0.0.1"
    port: Port = 50051
    redis_url: Annotated[str, BeforeValidator(_redis_url)]
    cluster: Name = "legato"
    cluster_key: ClusterKey
    max_waiting: Count = 1024
    # An idle decode worker itself prefills a prompt of at most so many tokens; 0: only when no prefill worker is there.
    decode_prefills_tokens: Annotated[int, Field(ge=0)] = 0
    default_timeout_s: Seconds = 120.0
    max_message_bytes: Count = MAX_MESSAGE_BYTES
    api_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_split)] = ()  # (): no key is asked for
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 8.0
    telemetry: TelemetryConfig = TelemetryConfig()


class ClusterConfig(Section):
    """What `legato up` starts. `prefill_engine` and `decode_engine` override single keys of `engine` for one pool."""

    model: str = Field(default="smollm2", min_length=1)
    prefill: Count = 1
    decode: Count = 1
    host: str = "127.0.0.1"
    port: Port = 50051
    redis_url: Annotated[str, BeforeValidator(_redis_url)] | None = None  # None: an embedded server
    cluster: Name = "legato"
    cluster_key: ClusterKey | None = None  # None: drawn at start
    api_keys: Annotated[tuple[SecretStr, ...], BeforeValidator(_split)] = ()
    drain_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 8.0
    engine: EngineConfig = EngineConfig()
    prefill_engine: EngineConfig = EngineConfig()
    decode_engine: EngineConfig = EngineConfig()
    handoff: HandoffConfig = HandoffConfig()
    kv_tiers: KVTiersConfig = KVTiersConfig()
    telemetry: TelemetryConfig = TelemetryConfig()

    @field_validator("engine", "prefill_engine", "decode_engine")
    @classmethod
    def _one_model(cls, engine: EngineConfig) -> EngineConfig:
        if "model" in engine.model_fields_set:
            raise ValueError("holds model; a cluster serves one model, set by the key model at the top")
        return engine

    @model_validator(mode="after")
    def _pools_exchange_blocks(self) -> ClusterConfig:
        pools = self._engine(self.prefill_engine), self._engine(self.decode_engine)
        for key in ("dtype", "quantisation", "activations", "adapters"):
            if getattr(pools[0], key) != getattr(pools[1], key):
                raise ValueError(
                    f"{key} must be the same in both pools, for one reads what the other answers: set it under engine"
                )
        return self

    def resolve(self, redis_url: str) -> ClusterConfig:
        """With the address of the Redis in use (of the embedded one, say) and a cluster key drawn where none is set."""
        key = self.cluster_key or SecretStr(secrets.token_hex(32))
        return self.model_copy(update={"redis_url": redis_url, "cluster_key": key})

    def workers(self) -> list[WorkerConfig]:
        """One per process, prefill pool first: `prefill-0`, ... `decode-0`, ... Call on what resolve() returned."""
        pools = [("prefill", self.prefill, self.prefill_engine), ("decode", self.decode, self.decode_engine)]
        return [
            WorkerConfig(
                role=role,  # type: ignore[arg-type]
                worker_id=f"{role}-{index}",
                host=self.host,
                engine=self._engine(overrides),
                handoff=self.handoff,
                kv_tiers=self.kv_tiers,
                **self._shared(f"legato-{role}"),
            )
            for role, count, overrides in pools
            for index in range(count)
        ]

    def router(self) -> RouterConfig:
        """Call on what resolve() returned."""
        return RouterConfig(
            router_id="router-0",
            host=self.host,
            port=self.port,
            api_keys=self.api_keys,
            **self._shared("legato-router"),
        )

    def _engine(self, overrides: EngineConfig) -> EngineConfig:
        """Workers of one host find themselves on the same GPUs, and share them."""
        changed = {key: getattr(overrides, key) for key in overrides.model_fields_set}
        if "gpu_memory_share" not in self.engine.model_fields_set:
            changed.setdefault("gpu_memory_share", self.engine.gpu_memory_share / (self.prefill + self.decode))
        return self.engine.model_copy(update={**changed, "model": self.model})

    def _shared(self, service_name: str) -> dict[str, Any]:
        assert self.redis_url is not None, "resolve() comes first"
        assert self.cluster_key is not None, "resolve() comes first"
        telemetry = self.telemetry.model_copy(
            update={"service_name": self.telemetry.service_name or service_name},
        )
        return {
            "redis_url": self.redis_url,
            "cluster": self.cluster,
            "cluster_key": self.cluster_key,
            "drain_s": self.drain_s,
            "telemetry": telemetry,
        }


def _check_step(engine: EngineConfig) -> None:
    """Found before anything is loaded."""
    if engine.max_step_tokens < engine.max_sequences:
        raise ValueError(
            f"engine.max_step_tokens ({engine.max_step_tokens}) must be at least engine.max_sequences "
            f"({engine.max_sequences}): a step holds a token of each sequence that runs"
        )


def to_yaml(config: Section) -> str:
    """What load() reads back to an equal config. Secrets are in it in clear: see save()."""
    return yaml.safe_dump(_plain(config.model_dump(exclude_unset=True)), sort_keys=False)


def save(config: Section, path: Path) -> None:
    """Writes to_yaml() to a file that only its owner may read, for it holds the cluster key."""
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(to_yaml(config), encoding="utf-8")


def without_overrides(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process whose config file is the whole truth: our LEGATO_* are not for it."""
    return {name: value for name, value in environment.items() if not name.startswith(ENVIRONMENT_PREFIX)}


def _plain(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, ByteSize) else value
