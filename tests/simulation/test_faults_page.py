"""docs/faults.md: every phase of every fault has a row, and the tests that rows name are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHASES = {"placed", "reserved", "prefilling", "moving", "handed over", "decoding", "finishing"}
FAULTS = [
    "Prefill worker dies",
    "Decode worker dies",
    "Router dies",
    "Client leaves",
    "Redis away",
    "Slow, cut or lossy link",
    "Message lost, repeated or out of order",
    "Restart on the same address",
    "Out of blocks",
    "Deadline passed",
]


def page() -> str:
    return (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")


def test_every_phase_of_every_fault_has_one_row_with_a_test() -> None:
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page(), flags=re.MULTILINE | re.DOTALL))
    for fault in FAULTS:
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in sections[fault].splitlines() if "|" in line
        ]
        cells = [row for row in rows if row[0] != "phase" and not row[0].startswith("---")]
        named = [phase.strip() for row in cells for phase in row[0].split(",")]
        assert sorted(named) == sorted(PHASES), fault
        assert all(len(row) == 5 and "::test_" in row[4] for row in cells), fault


def test_the_tests_that_it_names_are_there() -> None:
    named = set(re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", page()))
    assert len(named) > 30
    for path, name in sorted(named):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {name}\(", source, flags=re.MULTILINE), f"{path} has no {name}"
