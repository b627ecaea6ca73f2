"""docs/faults.md: every phase of every fault has a row with a test that every run plays; what rows name is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e import test_faults, test_networks
from tests.simulation.test_simulation import PLANTED

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
        assert all(len(row) == 5 and played_always(row[4]) for row in cells), fault


def played_always(cell: str) -> bool:
    """One of the tests that it names at the least."""
    return "::test_" in cell or re.search(r"test_(fault|link)\[[^]]+\](?!†)", cell) is not None


def test_the_tests_that_it_names_are_there() -> None:
    named = set(re.findall(r"(tests/[\w/]+\.py)::(test_\w+)", page()))
    assert len(named) > 30
    for path, name in sorted(named):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^(async )?def {name}\(", source, flags=re.MULTILINE), f"{path} has no {name}"


def test_the_cases_that_it_names_are_there_and_those_of_the_whole_grid_alone_are_marked() -> None:
    faults = {f"{phase}-{fault}": (phase, fault) in test_faults.COVERING for phase, fault in test_faults.GRID}
    links = {name: name in test_networks.COVERING for name in test_networks.CASES}
    plants = {plant.__name__: True for plant, _, _ in PLANTED}
    for test, cases in (("test_fault", faults), ("test_link", links), ("test_a_planted_bug_is_found", plants)):
        rows = [row for row in page().splitlines() if row.startswith("|")]
        named = [case for row in rows for case in re.findall(rf"\b{test}\b(?:\[([^]]+)\])?(†?)", row)]
        assert len(named) > 5
        for case, mark in named:
            assert case in cases, f"there is no {test}[{case}]"
            assert cases[case] == (not mark), f"{test}[{case}] is marked wrongly"
