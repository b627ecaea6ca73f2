"""The adapters of a worker: every rank opens the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from engine.adapters import AdapterFiles
from service.config import EngineConfig
from service.messages import adapter_id
from spec.errors import InvalidModel
from spec.model import ModelSpec


def open_adapters(
    config: EngineConfig, spec: ModelSpec, report: Callable[[float], None] = lambda fraction: None
) -> dict[str, AdapterFiles]:
    """By name. Reads all of their bytes, for their revisions. Raises InvalidModel and UnsupportedModel."""
    opened: dict[str, AdapterFiles] = {}
    for count, (name, folder) in enumerate(sorted(config.adapters.items())):
        report(count / len(config.adapters))
        opened[name] = AdapterFiles(Path(folder).expanduser(), spec)
        opened[name].revision  # noqa: B018  read now, while `report` says so
    return opened


def by_id(adapters: Mapping[str, AdapterFiles]) -> dict[str, AdapterFiles]:
    """As sequences, steps and engines name them: an id is of one content, also when the name gets another."""
    return {adapter_id(name, files.revision): files for name, files in adapters.items()}


def check_same(ours: Iterable[str], rank_0: Iterable[str]) -> None:
    """Ids. Raises InvalidModel where this rank and rank 0 would compute with different files."""
    if different := sorted(set(ours) ^ set(rank_0)):
        raise InvalidModel(f"this rank's files of the adapters are not those of rank 0: {', '.join(different)}")
