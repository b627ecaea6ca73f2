"""Which version two workers speak, and how it is said that there is none."""

from __future__ import annotations

import pytest

from legato.v1.worker_pb2 import WireVersions
from service.wire import NEWEST, OLDEST, agreed, spoken
from spec.errors import WireMismatch


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [((1, 1), (1, 1), 1), ((1, 3), (2, 5), 3), ((2, 5), (1, 3), 3), ((1, 1), (0, 0), 1), ((1, 4), (0, 0), 1)],
)
def test_the_newest_that_both_speak(ours: tuple[int, int], theirs: tuple[int, int], expected: int) -> None:
    assert agreed(WireVersions(oldest=ours[0], newest=ours[1]), _versions(theirs), "decode-0") == expected


@pytest.mark.parametrize(("ours", "theirs"), [((1, 1), (2, 3)), ((2, 3), (1, 1)), ((2, 3), (0, 0))])
def test_none_in_common_is_typed_and_says_which(ours: tuple[int, int], theirs: tuple[int, int]) -> None:
    with pytest.raises(WireMismatch, match="decode-0 speaks versions") as caught:
        agreed(_versions(ours), _versions(theirs), "decode-0")
    assert caught.value.retryable, "another worker may"
    said = caught.value.details
    assert said == {"ours": f"{ours[0]} to {ours[1]}", "theirs": f"{theirs[0] or 1} to {theirs[1] or 1}"}


def test_what_is_spoken_is_a_range() -> None:
    assert 1 <= OLDEST <= NEWEST
    assert spoken() == WireVersions(oldest=OLDEST, newest=NEWEST)


def _versions(pair: tuple[int, int]) -> WireVersions:
    return WireVersions(oldest=pair[0], newest=pair[1])
