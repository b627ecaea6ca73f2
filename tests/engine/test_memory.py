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
from tiny_models import make_model

from engine.model_files import open_model

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


# One rank: what the kernel counts for its weights, in pages that are in memory and no file's.
LOAD_RANK = """
import gc, json, sys, torch
from engine.model_files import open_model
from engine.weights import load_weights
from spec.layout import ParallelLayout
from spec.shard import shard_of

torch.set_num_threads(1)
folder, layout, rank = sys.argv[1], ParallelLayout.parse(sys.argv[2]), int(sys.argv[3])

def anonymous():
    gc.collect()
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

cpu = torch.device("cpu")
small = open_model(sys.argv[4])
load_weights(small, shard_of(small.spec, ParallelLayout(), 0), torch.bfloat16, cpu)
files = open_model(folder)
shard = shard_of(files.spec, layout, rank)
before = anonymous()
weights = load_weights(files, shard, torch.bfloat16, cpu)
print(json.dumps(anonymous() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "layout", "shares"),
    [
        ("llama3", "tp2", [0.5, 0.5]),
        ("llama3", "pp2", [0.5, 0.5]),
        ("llama3", "dp2-stage", [0.5, 0.5]),
        ("mixtral", "dp2-ep2", [0.5, 0.5]),
    ],
)
def test_a_rank_holds_its_share_of_the_weights_to_three_percent(
    tmp_path: Path, name: str, layout: str, shares: list[float]
) -> None:
    """Embedding and head are small here, and what dp holds twice too: half of the weights is each rank's share."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 4, "head_dim": 64, "vocab_size": 512, "num_attention_heads": 16}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 8192 if name == "llama3" else 4096}
    small, large = make_model(tmp_path / "small", name), make_model(tmp_path / "large", name, **sizes)
    _as_bfloat16(large)
    for rank, share in enumerate(shares):
        done = subprocess.run(
            [sys.executable, "-c", LOAD_RANK, str(large), layout, str(rank), str(small)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        spec = open_model(large).spec
        attention = spec.num_layers * spec.attention_parameters
        own = spec.num_parameters - attention
        expected = 2 * (share * own + attention * (1.0 if "dp" in layout else share))
        assert expected > 100e6, "large beside what an allocator rounds up"
        assert json.loads(done.stdout) == pytest.approx(expected, rel=0.03), (layout, rank)


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
