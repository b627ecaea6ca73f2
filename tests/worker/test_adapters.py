"""Every rank of a worker computes with the same adapters, or it does not start."""

from __future__ import annotations

import pytest

from spec.errors import InvalidModel
from worker.adapters import check_same


@pytest.mark.parametrize("rank_0", [["poems@2", "prose@1"], ["poems@1"], ["poems@1", "prose@1", "verse@1"]])
def test_a_rank_with_other_files_is_refused(rank_0: list[str]) -> None:
    check_same(["poems@1", "prose@1"], ["prose@1", "poems@1"])
    with pytest.raises(InvalidModel, match="not those of rank 0"):
        check_same(["poems@1", "prose@1"], rank_0)
