"""With the compiled CPU kernels a row's logits have the same bits whatever is computed beside it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import ranked_engine
from stepper import Stepper, rows_of
from tiny_models import MOE_MODELS, make_model

from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from kernels.cpu.library import shared_library
from spec.layout import ParallelLayout

pytestmark = pytest.mark.skipif(
    shared_library() is None, reason="no C++ compiler: torch's products depend on the batch"
)

# Wide enough that a product of torch or Gloo's sum would add up otherwise in another batch.
EXPERTS = {"hidden_size": 128, "moe_intermediate_size": 32}
LATENT = {"kv_lora_rank": 96, "qk_nope_head_dim": 48, "v_head_dim": 40, "intermediate_size": 64}
DTYPES = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def prompt(length: int, vocab: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(length)]


def compare(engine: Any, name: str) -> None:
    """The sequence `name` of 40 tokens alone at once, alone in chunks of one, and beside up to eight others."""
    vocab = engine.spec.vocab_size
    token_ids = prompt(40, vocab, 0)
    alone = Stepper(engine).run(token_ids)
    assert np.array_equal(Stepper(engine).run(token_ids, chunk=1), alone)
    generator, stepper = random.Random(1), Stepper(engine)
    running = [stepper.add(f"{name}{i}", prompt(40 - 3 * i, vocab, i), 14) for i in range(9)]
    while pending := [each for each in running if each.computed < len(each.token_ids)]:
        taken = generator.sample(pending, generator.randrange(1, len(pending) + 1))
        stepper.step([(each, max(1, min(11, each.num_prompt - each.computed))) for each in taken])
    assert np.array_equal(rows_of(running[0]), alone)


@DTYPES
@pytest.mark.parametrize("name", MOE_MODELS)
def test_a_rank_alone(name: str, dtype: str, tmp_path: Path) -> None:
    sizes = EXPERTS | (LATENT if name.startswith("deepseek") else {})
    files = open_model(make_model(tmp_path, name, **sizes))
    compare(Engine(files, EngineOptions(device="cpu", dtype=dtype, threads=1, block_tokens=7), 100), "s")


@DTYPES
@pytest.mark.parametrize(
    ("name", "layout"),
    [("llama-odd", ParallelLayout(tp=3)), ("deepseek-v3", ParallelLayout(tp=2, dp=2, ep=4))],
)
def test_ranks(name: str, layout: ParallelLayout, dtype: str, tmp_path: Path) -> None:
    with ranked_engine(make_model(tmp_path, name), layout, 100, dtype=dtype, block_tokens=7) as engine:
        compare(engine, "s")
