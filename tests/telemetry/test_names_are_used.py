"""A name that is declared and never recorded would be a promise to whoever watches."""

from __future__ import annotations

from pathlib import Path

import pytest

from telemetry import names

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("worker", "prefill_svc", "decode_svc", "router", "service", "legato")
DECLARED = [name for name in vars(names) if name.isupper() and isinstance(getattr(names, name), str | names.Metric)]
# The base install of the SDK has no telemetry room: its span, and what only that says, are named there by word.
BY_WORD = {name: f'"{getattr(names, name)}"' for name in ("SPAN_CLIENT", "OUTPUT_TOKENS")}


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_name_is_recorded(name: str) -> None:
    word = BY_WORD.get(name, f"names.{name}")
    assert any(word in path.read_text() for room in ROOMS for path in (ROOT / room).rglob("*.py")), name
