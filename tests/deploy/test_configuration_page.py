"""docs/configuration.md says every key, its variable and its default: the models of service/config.py are the truth."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from service import config
from service.config_source import ENVIRONMENT_PREFIX, NESTING

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
TABLES: dict[str, tuple[type[BaseModel], str]] = {  # heading -> (model, the section it is inside)
    "Router": (config.RouterConfig, ""),
    "Worker": (config.WorkerConfig, ""),
    "legato up": (config.ClusterConfig, ""),
    "engine": (config.EngineConfig, "engine"),
    "handoff": (config.HandoffConfig, "handoff"),
    "kv_tiers": (config.KVTiersConfig, "kv_tiers"),
    "telemetry": (config.TelemetryConfig, "telemetry"),
}


def default_of(field: Any) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, BaseModel):
        return "a section"
    if field.default is None or field.default in ((), {}):
        return ""
    if isinstance(field.default, tuple):
        return ",".join(field.default)
    return f"{field.default:g}" if isinstance(field.default, float) else str(field.default)


def expected(model: type[BaseModel], section: str) -> set[tuple[str, str, str]]:
    rows = set()
    for name, field in model.model_fields.items():
        path = [section, name] if section else [name]
        default = default_of(field)
        variable = "" if default == "a section" else ENVIRONMENT_PREFIX + NESTING.join(path).upper()
        rows.add((".".join(path), variable, default))
    return rows


def tables() -> dict[str, list[list[str]]]:
    """{heading: rows of cells, without code marks}."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        elif line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            found.setdefault(heading, []).append([cell.replace("`", "") for cell in cells])
    return found


@pytest.mark.parametrize("heading", list(TABLES))
def test_the_page_holds_every_key_with_its_variable_and_default(heading: str) -> None:
    rows = tables()[heading]
    assert {(key, variable, default) for key, variable, default, _ in rows} == expected(*TABLES[heading])
    assert len(rows) == len({row[0] for row in rows})
    assert all(meaning for *_, meaning in rows), "each key says what it is for"


def test_the_page_has_no_other_tables() -> None:
    assert set(tables()) == set(TABLES)


def test_the_page_and_compose_name_no_variable_that_does_not_exist() -> None:
    known = {variable for model, section in TABLES.values() for _, variable, _ in expected(model, section)}
    known |= {variable.replace("ENGINE", f"{pool}_ENGINE") for variable in known for pool in ("PREFILL", "DECODE")}
    named = set(re.findall(r"\bLEGATO_[A-Z_]+[A-Z]\b", PAGE.read_text(encoding="utf-8")))
    assert named <= known
