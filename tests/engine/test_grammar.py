"""Constrained draws in the engine: what is drawn is what the mask's own rows say, wherever a sequence goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ranks import ranked_engine
from tiny_llama import SHAPES, make_llama

from engine import grammar
from engine.engine import Engine, EngineOptions
from engine.grammar import Grammars, Matcher
from engine.model_files import open_model
from scheduler.batch import Failed, Scheduler, SchedulerConfig, Tokens
from scheduler.plan import Executor
from scheduler.sequence import Sequence
from service.grammar import Compiler, Vocabulary
from service.tokenizer import Tokenizer, load_tokenizer
from spec.constraint import Constraint
from spec.errors import InvalidParameter, LegatoError
from spec.layout import ParallelLayout
from spec.sampling import SamplingParams, Speculation

BLOCKS, VOCAB = 60, SHAPES[0].vocab_size
SCHEMA = {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 4}
JSON = Constraint("json_schema", (json.dumps(SCHEMA),))
WORD = Constraint("regex", ("[a-z]{2,9}[0-9]?",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    compiler = Compiler(lambda: Vocabulary(tokenizer.definition, VOCAB, (2,)))
    made = Grammars(compiler.compile, range(VOCAB), 64)
    yield made
    made.close()


def engine_of(folder: Path, grammars: Grammars | None) -> Engine:
    return Engine(open_model(folder), EngineOptions(device="cpu", block_tokens=7), BLOCKS, grammars=grammars)


def serve(
    engine: Executor, sequences: list[Sequence], num_blocks: int = BLOCKS
) -> tuple[dict[str, tuple[list[int], str]], dict[str, LegatoError], Scheduler]:
    """(tokens and how they end, errors, the scheduler) by sequence."""
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_tokens=7,
        max_step_tokens=48,
        max_sequences=8,
        max_context_tokens=300,
        eos_token_ids=(2,),
    )
    scheduler = Scheduler(config)
    found: dict[str, tuple[list[int], str]] = {}
    failed: dict[str, LegatoError] = {}
    for sequence in sequences:
        scheduler.add(sequence, 0.0)
    while (plan := scheduler.plan(0.0)) is not None:
        for event in scheduler.commit(plan, engine.execute(plan), 0.0):
            if isinstance(event, Tokens):
                tokens, _ = found.get(event.sequence_id, ([], ""))
                found[event.sequence_id] = tokens + [each.token_id for each in event.drawn], event.finish or ""
            elif isinstance(event, Failed):
                failed[event.sequence_id] = event.error
    assert set(scheduler.counts().values()) == {0}
    return found, failed, scheduler


def requests(**more: Any) -> list[Sequence]:
    """Of every sort; every third without a constraint."""
    made = []
    for number in range(24):
        params = SamplingParams(
            max_tokens=60,
            temperature=number % 5 / 2,
            top_k=[0, 9][number % 2],
            seed=number,
            repetition_penalty=[1.0, 1.3][number // 12],
            constraint=[JSON, WORD, None][number % 3],
        )
        prompt = tuple(range(5 + number, 20 + number))
        made.append(Sequence(f"s{number}", prompt, [], dataclasses.replace(params, **more)))
    return made


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    return tokenizer.decode(tokens[:-1] if tokens[-1] == 2 else tokens)


def test_answers_keep_to_their_constraints(folder: Path, tokenizer: Tokenizer, grammars: Grammars) -> None:
    found, failed, _ = serve(engine_of(folder, grammars), requests())
    assert not failed
    for number in range(24):
        tokens, finish = found[f"s{number}"]
        if number % 3 == 0:
            assert finish == "stop"
            jsonschema.validate(json.loads(text_of(tokenizer, tokens)), SCHEMA)
        elif number % 3 == 1:
            assert finish == "stop"
            assert re.fullmatch(WORD.texts[0], text_of(tokenizer, tokens))
    assert not grammars._states, "matchers go with the answers that they end"


def test_one_without_is_what_it_is_alone(folder: Path, grammars: Grammars) -> None:
    plain = [sequence for sequence in requests() if sequence.params.constraint is None]
    alone, _, _ = serve(engine_of(folder, None), plain)
    found, _, _ = serve(engine_of(folder, grammars), requests())
    assert {name: found[name] for name in alone} == alone


def test_whoever_goes_on_draws_the_same(folder: Path, grammars: Grammars) -> None:
    """Preempted, replayed from the tokens alone, forgotten between two steps, and guessed ahead."""
    engine = engine_of(folder, grammars)
    expected, _, _ = serve(engine, requests())
    crowded, _, scheduler = serve(engine, requests(), num_blocks=16)
    assert scheduler.totals()["preemptions"] > 0
    assert crowded == expected
    for cut in (1, 5):
        going_on = requests()
        for sequence in going_on:
            sequence.output_token_ids += expected[sequence.sequence_id][0][:cut]
        going_on = [s for s in going_on if len(expected[s.sequence_id][0]) > cut]
        resumed, failed, _ = serve(engine, going_on)
        assert not failed
        for name, (tokens, finish) in resumed.items():
            assert (expected[name][0][:cut] + tokens, finish) == expected[name]
    grammars._max_sequences = 2
    assert serve(engine, requests())[0] == expected
    grammars._max_sequences = 64
    guessed, _, scheduler = serve(engine, requests(speculation=Speculation("prompt_lookup", 5, 1)))
    assert guessed == expected
    assert scheduler.totals()["accepted_tokens"] > 0


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_ranks_mask_their_parts(folder: Path, grammars: Grammars, layout: str) -> None:
    sequences = requests(repetition_penalty=1.0)
    expected, _, _ = serve(engine_of(folder, grammars), sequences)
    with ranked_engine(folder, ParallelLayout.parse(layout), block_tokens=7) as ranks:
        found, failed, _ = serve(ranks, requests(repetition_penalty=1.0))
    assert not failed
    assert found == expected


def test_tokens_that_break_the_constraint_fail_alone(folder: Path, tokenizer: Tokenizer, grammars: Grammars) -> None:
    forced = tokenizer.encode("ab", add_special=False)
    good, bad, resumed = (Sequence(name, (5, 6, 7), [], SamplingParams(max_tokens=30)) for name in ("a", "b", "c"))
    good.params = dataclasses.replace(good.params, constraint=WORD, forced_token_ids=tuple(forced))
    bad.params = dataclasses.replace(bad.params, constraint=JSON, forced_token_ids=tuple(forced))
    resumed.params = dataclasses.replace(resumed.params, constraint=JSON)
    resumed.output_token_ids += forced
    found, failed, _ = serve(engine_of(folder, grammars), [good, bad, resumed])
    assert found["a"][1] == "stop" and text_of(tokenizer, found["a"][0]).startswith("ab")
    for name in ("b", "c"):
        assert isinstance(failed[name], InvalidParameter)
        assert str(failed[name]) == f"json_schema {grammar.BROKEN}"


class Stubborn:
    """A matcher that admits everything at first, and then what the test says."""

    def __init__(self, gate: threading.Event | None, bits: bytes) -> None:
        self.gate, self.bits = gate, bits

    def deep_copy(self) -> Matcher:
        return self

    def try_consume_tokens(self, tokens: list[int], /) -> int:
        return len(tokens)

    def rollback(self, num_tokens: int, /) -> bool:
        return True

    def compute_bitmask(self) -> bytes:
        if self.gate is not None:
            self.gate.wait(20.0)
        return self.bits

    def is_stopped(self) -> bool:
        return False

    def is_error(self) -> bool:
        return False

    def get_error(self) -> str:
        return ""


def test_a_dead_end_and_a_matcher_that_hangs_fail_alone(
    folder: Path, grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "MASK_WAIT_S", 0.2)
    gate, nothing, everything = threading.Event(), bytes(56), b"\xff" * 56
    matchers = {"dead": Stubborn(None, nothing), "slow": Stubborn(gate, everything)}
    compile_real = grammars._compile
    grammars._compile = lambda constraint: matchers.get(constraint.texts[0]) or compile_real(constraint)
    sequences = [
        Sequence(name, (5, 6), [], SamplingParams(max_tokens=20, constraint=Constraint("regex", (name,))))
        for name in ("dead", "slow", "[ab]{3}")
    ]
    found, failed, _ = serve(engine_of(folder, grammars), sequences)
    gate.set()
    assert list(found) == ["[ab]{3}"]
    assert found["[ab]{3}"][1] == "stop"
    assert str(failed["dead"]) == f"regex {grammar.DEAD_END}"
    assert str(failed["slow"]).startswith("regex took more than")


def test_an_engine_without_a_vocabulary_refuses(folder: Path) -> None:
    _, failed, _ = serve(engine_of(folder, None), [Sequence("a", (5,), [], SamplingParams(constraint=WORD))])
    assert str(failed["a"]) == "regex is not served here"


def test_a_constraint_is_compiled_once(grammars: Grammars) -> None:
    calls = itertools.count()
    compile_real = grammars._compile

    def counting(constraint: Constraint) -> Matcher:
        next(calls)
        return compile_real(constraint)

    grammars._compile = counting
    found = {grammars.compiled(Constraint("regex", ("[ab]{3}",))) for _ in range(20)}
    assert len(found) == 1 and found.pop().result() is not None
    for number in range(grammar.MAX_COMPILED + 9):
        grammars.compiled(Constraint("choice", (str(number),)))
    assert len(grammars._compiled) == grammar.MAX_COMPILED
    for compiling in list(grammars._compiled.values()):
        compiling.result()
    assert next(calls) == grammar.MAX_COMPILED + 10
