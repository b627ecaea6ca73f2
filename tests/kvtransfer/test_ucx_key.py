"""A buggy owner tells its writer nonsense: the writer's process lives on, and no byte lands where it should not."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("lying_owner.py")
NBYTES = 300_007
NOISE = hashlib.blake2b(random.Random(5).randbytes(NBYTES)).hexdigest()
ZEROS = hashlib.blake2b(bytes(NBYTES)).hexdigest()


def started(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@contextlib.contextmanager
def lying(field: str, value: str, sealed: bool) -> Iterator[subprocess.Popen[str]]:
    owner = started("own", field, value, "sealed" if sealed else "unsealed")
    try:
        yield owner
    finally:
        owner.communicate(timeout=20)


def told(owner: subprocess.Popen[str]) -> list[str]:
    assert owner.stdout is not None
    return owner.stdout.readline().split()


def outcome(owner: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """What the writer says, once it has ended well; the digests of the region and of the owner's other region."""
    writer = started("write", *told(owner))
    said, _ = writer.communicate(timeout=20)
    assert writer.returncode == 0, f"the writer ended with {writer.returncode}"
    assert owner.stdin is not None
    owner.stdin.write("digest\n")
    owner.stdin.flush()
    return said.strip(), told(owner)


TB = str(10**12)


@pytest.mark.parametrize(
    ("field", "value", "sealed", "why"),
    [
        ("remote_key", "half", False, "damaged"),
        ("base_address", TB, False, "damaged"),
        ("region_bytes", TB, False, "damaged"),
    ],
)
def test_an_answer_that_is_not_as_it_was_sealed_is_refused(field: str, value: str, sealed: bool, why: str) -> None:
    with lying(field, value, sealed) as owner:
        said, digests = outcome(owner)
    assert why in said
    assert digests == [ZEROS, ZEROS]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_address", TB),
        ("base_address", "4096"),
        ("base_address", "other"),
        ("region_bytes", TB),
        ("remote_key", "empty"),
    ],
)
def test_a_wrong_place_well_sealed_is_not_written_to(field: str, value: str) -> None:
    """The pieces go as messages, whose place the owner knows by itself."""
    with lying(field, value, sealed=True) as owner:
        assert outcome(owner) == ("landed by message", [NOISE, ZEROS])


def test_the_truth_leads_to_shared_memory() -> None:
    with lying("base_address", "0", sealed=True) as owner:
        assert outcome(owner) == ("landed by copy", [NOISE, ZEROS])
