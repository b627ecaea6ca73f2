from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu.build import BuildFailed, build
from kernels.cpu.library import Library

TARGETS = ["native"]
if platform.machine() == "x86_64":
    TARGETS.append("x86-64-v3")  # the same sources in 256 bits and without bf16 instructions
GUARD = 64


@pytest.fixture(scope="session", params=TARGETS)
def library(request: pytest.FixtureRequest) -> Library:
    try:
        return Library(build(target=request.param))
    except BuildFailed as error:
        pytest.skip(str(error))


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the library allocates starts as NaN and lies between guards, which are whole at the end."""
    allocated: list[Tensor] = []

    def allocate(tensor: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = torch.Size(shape)
        dtype = dtype or tensor.dtype
        unwritten = float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min
        memory = torch.full((size.numel() + 2 * GUARD,), unwritten, dtype=dtype)
        memory[:GUARD] = memory[-GUARD:] = 7.0
        allocated.append(memory)
        return memory[GUARD:-GUARD].view(size)

    def allocate_like(tensor: Tensor) -> Tensor:
        return allocate(tensor, *tensor.shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", allocate)
    monkeypatch.setattr(torch, "empty_like", allocate_like)
    yield
    monkeypatch.undo()
    assert allocated
    for memory in allocated:
        assert (memory[:GUARD] == 7.0).all()
        assert (memory[-GUARD:] == 7.0).all()
        assert not memory.isnan().any(), "an element was left unwritten"
