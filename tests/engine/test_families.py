"""Every family against transformers in float32, to 1e-4 relative (P1): whole, in chunks, and in mixed steps."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import pytest
from stepper import Stepper, rows_of, whole_row, worst_difference
from tiny_llama import load_reference, reference_of
from tiny_models import MODELS, make_model

from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from scheduler.plan import Draw, Slice, StepPlan
from spec.sampling import SamplingParams

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=MODELS)
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, object]:
    folder = make_model(tmp_path_factory.mktemp(request.param), request.param)
    return folder, load_reference(folder)


def engine_on(folder: Path, block_tokens: int = 5) -> Engine:
    return Engine(open_model(folder), EngineOptions(device="cpu", block_tokens=block_tokens), 300)


def prompt(length: int, vocab: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(vocab) for _ in range(length)]


def test_whole_and_in_chunks(model: tuple[Path, object]) -> None:
    folder, oracle = model
    engine = engine_on(folder)
    token_ids = prompt(77, engine.spec.vocab_size)
    expected = reference_of(oracle, token_ids)
    stepper = Stepper(engine)
    for chunk in (None, 33, 7):
        assert worst_difference(stepper.run(token_ids, chunk), expected) < TOLERANCE, f"chunk {chunk}"


def test_in_mixed_steps(model: tuple[Path, object]) -> None:
    folder, oracle = model
    engine = engine_on(folder, block_tokens=16)
    generator = random.Random(1)
    stepper = Stepper(engine)
    # longer than the original context of longrope, at which transformers changes its mind about positions
    running = [stepper.add(f"s{i}", prompt(40 + 7 * i, engine.spec.vocab_size, i), 30 + i) for i in range(4)]
    while pending := [each for each in running if each.computed < len(each.token_ids)]:
        taken = generator.sample(pending, generator.randrange(1, len(pending) + 1))
        stepper.step([(each, max(1, min(11, each.num_prompt - each.computed))) for each in taken])
    for each in running:
        assert worst_difference(rows_of(each), reference_of(oracle, each.token_ids)) < TOLERANCE, each.name


def test_a_chunk_that_draws_nothing(model: tuple[Path, object]) -> None:
    """As those of a long prompt but the last: of none of its rows logits are wanted."""
    folder, oracle = model
    engine = engine_on(folder)
    vocab, token_ids = engine.spec.vocab_size, prompt(77, engine.spec.vocab_size)
    table = tuple(range(engine.kv.layout.blocks_for(77)))
    last = Draw(SamplingParams(temperature=0.0, logprobs=vocab), 77, 77, ())
    first_chunk = Slice("a", tuple(token_ids[:19]), 0, table[: engine.kv.layout.blocks_for(19)], None)
    assert engine.execute(StepPlan(0, (first_chunk,))).drawn == ((),)
    ((drawn,),) = engine.execute(StepPlan(1, (Slice("a", tuple(token_ids[19:]), 19, table, last),))).drawn
    found = whole_row(drawn.logprobs, vocab)
    assert worst_difference(found[None], reference_of(oracle, token_ids)[-1:]) < TOLERANCE


@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3"])
def test_quantised_kv_is_near(model: tuple[Path, object], kv_dtype: str) -> None:
    """A scale for each row: int8 is off by less than 1/254 of a row's greatest value, E4M3 by 1/16 of each value. Of
    the rows' differences the median: a token may go to another expert, and then differs more."""
    folder, oracle = model
    options = EngineOptions(device="cpu", block_tokens=5, kv_dtype=kv_dtype)
    engine = Engine(open_model(folder), options, 300)
    token_ids = prompt(77, engine.spec.vocab_size)
    expected = reference_of(oracle, token_ids)
    found = Stepper(engine).run(token_ids, 33)
    rows = [worst_difference(one[None], other[None]) for one, other in zip(found, expected, strict=True)]
    assert 1e-6 < statistics.median(rows) < (0.01 if kv_dtype == "int8" else 0.05)
