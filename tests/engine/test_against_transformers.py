"""Log-probabilities of random Llamas through `execute`, against transformers in float32, to 1e-4 relative (P1)."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import numpy as np
import pytest
from stepper import Stepper, rows_of, worst_difference
from tiny_llama import SHAPES, Shape, load_reference, make_llama, reference_of

from engine.engine import Engine, EngineOptions
from engine.model_files import open_model

MORE_SHAPES = [
    Shape("gqa4-biases", num_attention_heads=8, num_key_value_heads=2, head_dim=6, attention_bias=True, mlp_bias=True),
    Shape("gqa8-untied", num_attention_heads=8, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False),
]
ALL_SHAPES = [*SHAPES, *MORE_SHAPES]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, object]:
    shape: Shape = request.param
    folder = make_llama(tmp_path_factory.mktemp(shape.name), shape)
    return folder, load_reference(folder)


def engine_on(folder: Path, block_tokens: int = 5, num_blocks: int = 300) -> Engine:
    return Engine(open_model(folder), EngineOptions(device="cpu", block_tokens=block_tokens), num_blocks)


@functools.cache
def prompt(length: int, vocab: int, seed: int = 0) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(vocab) for _ in range(length))


@pytest.mark.parametrize("model", ALL_SHAPES, ids=lambda shape: shape.name, indirect=True)
def test_whole_and_in_chunks(model: tuple[Path, object]) -> None:
    folder, oracle = model
    engine = engine_on(folder)
    token_ids = prompt(131, engine.spec.vocab_size)
    expected = reference_of(oracle, list(token_ids))
    stepper = Stepper(engine)
    for chunk in (None, 64, 7, 1):
        found = stepper.run(token_ids, chunk)
        assert worst_difference(found, expected) < TOLERANCE, f"chunk {chunk}"


@pytest.mark.parametrize("model", ALL_SHAPES[:2] + MORE_SHAPES, ids=lambda shape: shape.name, indirect=True)
def test_sixteen_sequences_in_mixed_steps(model: tuple[Path, object]) -> None:
    """Each step takes a random part of the sequences, with a random chunk or a single token each, in random order."""
    folder, oracle = model
    engine = engine_on(folder, block_tokens=16)
    generator = random.Random(1)
    stepper = Stepper(engine)
    running = []
    for i in range(16):
        length = generator.randrange(1, 90)
        token_ids = prompt(length, engine.spec.vocab_size, seed=i)
        running.append(stepper.add(f"s{i}", token_ids, num_prompt=generator.randrange(1, length + 1)))
    while pending := [each for each in running if each.computed < len(each.token_ids)]:
        generator.shuffle(pending)
        taken = pending[: generator.randrange(1, len(pending) + 1)]
        chunk = generator.choice((1, 3, 19))
        shares = [(each, max(1, min(chunk, each.num_prompt - each.computed))) for each in taken]
        stepper.step(shares)
    for each in running:
        assert worst_difference(rows_of(each), reference_of(oracle, each.token_ids)) < TOLERANCE, each.name


@pytest.mark.parametrize("model", [SHAPES[0]], ids=lambda shape: shape.name, indirect=True)
def test_a_shared_prefix_is_read_where_another_wrote_it(model: tuple[Path, object]) -> None:
    folder, oracle = model
    engine = engine_on(folder, block_tokens=8)
    stepper = Stepper(engine)
    first = stepper.add("first", prompt(40, engine.spec.vocab_size))
    stepper.step([(first, 40)])
    second = stepper.add("second", [*first.token_ids[:24], *prompt(17, engine.spec.vocab_size, seed=9)])
    second.blocks = (*first.blocks[:3], *second.blocks[3:])
    second.computed = 24
    stepper.step([(second, 17)])
    expected = reference_of(oracle, second.token_ids)[24:]
    found = np.stack([second.logprobs[row] for row in range(24, 41)])
    assert worst_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize("model", [SHAPES[3]], ids=lambda shape: shape.name, indirect=True)
def test_far_positions(model: tuple[Path, object]) -> None:
    """Up to the last position of the context, where errors of the rotary tables are largest."""
    folder, oracle = model
    engine = engine_on(folder, block_tokens=16)
    token_ids = prompt(engine.spec.max_context_tokens, engine.spec.vocab_size)
    found = Stepper(engine).run(token_ids, 64)
    assert worst_difference(found, reference_of(oracle, list(token_ids))) < TOLERANCE
