"""Helpers serve one caller at a time, and nobody waits for one that does not come."""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.cpu.library import Library

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("one_thread")
def test_callers_at_the_same_time_get_their_own_results(library: Library) -> None:
    torch.set_num_threads(4)
    panels = library.pack(torch.randn(640, 128))
    inputs = [torch.randn(rows, 128) for rows in (1, 3, 40, 200)]
    expected = [library.linear(x, panels, None, 640) for x in inputs]

    def many_times(index: int) -> bool:
        torch.set_num_threads(4)  # torch keeps the number per thread
        return all(torch.equal(library.linear(inputs[index], panels, None, 640), expected[index]) for _ in range(300))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(many_times, range(4)))


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")
def test_a_forked_process_works_alone(library: Library) -> None:
    code = (
        "import os, sys, torch; from pathlib import Path; from kernels.cpu.library import Library\n"
        f"library = Library(Path({str(library.path)!r})); torch.set_num_threads(3)\n"
        "x, panels = torch.ones(64, 256), library.pack(torch.ones(512, 256))\n"
        "assert (library.linear(x, panels, None, 512) == 256).all()\n"
        "child = os.fork()\n"
        "right = bool((library.linear(x, panels, None, 512) == 256).all())\n"
        "if child == 0: os._exit(0 if right else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
