"""Weights are held once, and start-up never holds two copies: measured by the kernel's own count of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import Shape, make_llama

# What the kernel counts for this process, after a small model made every import and every one-time allocation.
LOAD = """
import json, resource, sys, torch
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model

def load(folder):
    return Engine(open_model(folder), EngineOptions(dtype="bfloat16", device="cpu", threads=1), 4)

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

small = load(sys.argv[1])
small.warm_up()
before = resident()
large = load(sys.argv[2])
large.warm_up()
status = open("/proc/self/status").read()  # getrusage() would count the parent's memory at the fork
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"before": before, "after": resident(), "peak": peak, "weights": large.spec.num_parameters * 2}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_held_once_also_while_they_are_loaded(tmp_path: Path) -> None:
    small = make_llama(tmp_path / "small", Shape("small"))
    shape = Shape(
        "large", hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, vocab_size=16_000, head_dim=256
    )
    large = make_llama(tmp_path / "large", shape)
    _as_bfloat16(large)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(small), str(large)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    weights = found["weights"]
    assert weights > 200e6, "large beside what a process holds anyway"
    assert found["after"] - found["before"] < 1.25 * weights
    assert found["peak"] - found["before"] < 1.5 * weights, "the largest projection twice, not the model twice"


def _as_bfloat16(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}, file)
