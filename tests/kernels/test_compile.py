"""Every row of every table compiles to machine code for the GPUs we name, without a GPU, spills no register and fits.

`pytest -rP` or `python -m kernels.tune --report` shows registers, spills and shared memory.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")

from kernels import compilation, tuning
from kernels.tuned_shapes import SHAPES

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted")

Compiled = dict[tuple[str, int], Future[list[compilation.Usage]]]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Compiled]:
    """Of the tests that were asked for, by two processes, each of which compiles nothing twice."""
    wanted = [
        (item.callspec.params["shape"], item.callspec.params["architecture"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__) and "compiled" in item.fixturenames
    ]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {each: pool.submit(compilation.compile_shape, *each) for each in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("architecture", list(tuning.SHARED_BYTES))
@pytest.mark.parametrize("shape", list(SHAPES))
def test_compiles_without_a_spill(shape: str, architecture: int, compiled: Compiled) -> None:
    launched = compiled[shape, architecture].result()
    assert SHAPES[shape].operation in {usage.operation for usage in launched}
    for usage in launched:
        print(compilation.line_of(shape, usage))
        assert usage.ptx_target == compilation.TARGETS[compilation.capability_of(usage.operation, architecture)]
        assert usage.cubin_bytes > 0
        assert usage.fault is None, f"{usage.operation} {usage.fault}"


@pytest.mark.parametrize("architecture", list(tuning.SHARED_BYTES))
def test_every_row_of_every_table_is_reached(architecture: int) -> None:
    reached = {row for shape in SHAPES for row in compilation.record(shape, architecture).rows}
    for operation in tuning.operations():
        for index, row in enumerate(tuning.table(operation, architecture).rows):
            assert (operation, index) in reached, f"no shape launches {operation} as {row}"
    assert set(compilation.KERNELS) == set(tuning.operations())


@pytest.mark.parametrize(
    ("tiles", "warps", "stages", "expected"),
    [
        ({"rows": 256, "kv_tokens": 64}, 4, 2, "spills"),
        ({"rows": 64, "kv_tokens": 64}, 8, 8, "shared memory"),
        ({"rows": 64, "kv_tokens": 48}, 8, 2, "does not compile"),
        ({"rows": 64, "kv_tokens": 32}, 8, 2, None),
    ],
)
def test_what_may_not_be_launched_is_said(tiles: dict[str, int], warps: int, stages: int, expected: str | None) -> None:
    found = compilation.fault_of("paged_attention, chunk fp16 32/8 128", 80, tuning.Config(tiles, warps, stages))
    assert found is None if expected is None else expected in str(found)
