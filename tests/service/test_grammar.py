"""Constraints against the tokenizers that are served, and the process that tries them out. Oracles: re, json."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest
from llguidance import LLMatcher
from tiny_llama import SHAPES, make_llama
from tiny_tokenizers import train_byte_level, train_sentencepiece_like, write_tokenizer_gguf

from service.grammar import Compiler, Vocabulary, probe
from service.sandbox import Sandbox
from service.tokenizer import Tokenizer, load_tokenizer
from spec.constraint import Constraint
from spec.errors import InvalidParameter, Overloaded

SLOW = Constraint("regex", ("".join(f"(a{i}|.*)" for i in range(6000)),))
DEEP = Constraint("grammar", ("start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"\n',))


def vocabulary_of(tokenizer: Tokenizer, wider: int = 0, eos: tuple[int, ...] = (2,)) -> Vocabulary:
    return Vocabulary(tokenizer.definition, tokenizer.vocab_size + wider, eos)


def tokens_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """As a model writes them behind a prompt: sentencepiece's own space in front of a text is none of it."""
    mark = tokenizer.encode("|", add_special=False)
    token_ids = tokenizer.encode(f"|{text}", add_special=False)
    assert token_ids[: len(mark)] == mark
    return token_ids[len(mark) :]


def takes(matcher: LLMatcher, tokenizer: Tokenizer, text: str) -> bool:
    """Whether it is a whole answer, in the tokens that the tokenizer makes of it."""
    token_ids = tokens_of(tokenizer, text)
    fresh = matcher.deep_copy()
    return fresh.try_consume_tokens(token_ids) == len(token_ids) and fresh.is_accepting()


def allowed(matcher: LLMatcher) -> set[int]:
    bits = matcher.compute_bitmask()
    return {at for at in range(8 * len(bits)) if bits[at // 8] >> (at % 8) & 1}


@pytest.fixture(params=["byte-level", "sentencepiece", "gguf"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    match request.param:
        case "byte-level":
            return Tokenizer(train_byte_level(), {})
        case "sentencepiece":
            return Tokenizer(train_sentencepiece_like(), {})
    return load_tokenizer(
        write_tokenizer_gguf(tmp_path / "a.gguf", train_sentencepiece_like(), "llama", bos_token_id=1, eos_token_id=2)
    )


def test_whole_answers_of_every_kind(tokenizer: Tokenizer) -> None:
    compiler = Compiler(lambda: vocabulary_of(tokenizer, wider=37))
    schema = json.dumps({"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"]})
    cases = [
        (
            Constraint("json_schema", (schema,)),
            ['{"é":1}', '{"é": 12, "x": [null]}', '{\n  "é" : -3}'],
            ['{"é":1.5}', "{}"],
        ),
        (Constraint("json_schema", (" true ",)), ["1", '"a"', "[]", '{"a": {}}'], ["", "nul"]),
        (Constraint("regex", (r"ab*c?|(x|é){2}",)), ["a", "abbc", "xé"], ["b", "x", "abcc"]),
        (Constraint("choice", ('say "é"\n', "a", "ab")), ['say "é"\n', "a", "ab"], ["", "b", 'say "é"']),
        (Constraint("grammar", ('start: "(" start? ")"',)), ["()", "((()))"], ["", "(()"]),
    ]
    for constraint, whole, others in cases:
        matcher = compiler.compile(constraint)
        for text in whole + others:
            assert takes(matcher, tokenizer, text) == (text in whole), (constraint, text)


def test_the_end_comes_where_the_answer_is_whole_and_never_inside(tmp_path: Path) -> None:
    """Of this tokenizer the end token is an ordinary word, "</s>", that a string could hold."""
    tokenizer = load_tokenizer(make_llama(tmp_path / "model", SHAPES[0]))
    compiler = Compiler(lambda: vocabulary_of(tokenizer, eos=(2, 5)))
    ends = {2, 5}
    matcher = compiler.compile(Constraint("json_schema", ('{"type": "string"}',)))
    assert allowed(matcher).isdisjoint(ends)
    matcher.consume_tokens(tokenizer.encode('"a<', add_special=False))
    assert allowed(matcher).isdisjoint(ends)
    assert len(allowed(matcher)) > 100
    matcher.consume_tokens(tokenizer.encode('"', add_special=False))
    assert matcher.is_stopped()
    matcher = compiler.compile(Constraint("regex", ("a+",)))
    assert allowed(matcher).isdisjoint(ends)
    matcher.consume_tokens(tokenizer.encode("a", add_special=False))
    assert ends < allowed(matcher)
    assert not matcher.is_stopped()
    padding = Compiler(lambda: vocabulary_of(tokenizer, wider=100)).compile(Constraint("regex", (".*",)))
    assert max(allowed(padding)) < tokenizer.vocab_size


def test_whitespace_between_jsons_tokens_ends() -> None:
    tokenizer = Tokenizer(train_byte_level(), {})
    matcher = Compiler(lambda: vocabulary_of(tokenizer)).compile(Constraint("json_schema", ("{}",)))
    for text in ('{"a": 1}', '{\n "a": [\n  1,\n  2\n ]\n}', '{"a" :1 }'):
        assert json.loads(text) is not None and takes(matcher, tokenizer, text), text
    for text in ('{"a":  1}', '{\n\n"a": 1}', '{"a":\t1}', " 1", "1 "):
        assert not takes(matcher, tokenizer, text), text


def test_a_tokenizer_that_cannot_be_held_to_anything() -> None:
    compiler = Compiler(lambda: Vocabulary(json.dumps({"model": {"vocab": {}}, "added_tokens": []}), 5, ()))
    with pytest.raises(InvalidParameter, match="regex cannot be kept to: the model's tokenizer"):
        compiler.compile(Constraint("regex", ("a",)))


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint("regex", ("a(b",)),
        Constraint("regex", (r"(a)\1",)),
        Constraint("regex", ("((((a{100}){100}){100}){100})",)),
        Constraint("json_schema", ('{"$ref": "#"}',)),
        Constraint("json_schema", ("false",)),
        Constraint("json_schema", ('{"$ref": "file:///etc/passwd"}',)),
        Constraint("grammar", ("start: start",)),
        Constraint("grammar", ("start: there",)),
    ],
)
def test_what_cannot_be_kept_to_is_said(constraint: Constraint) -> None:
    compiler = Compiler(lambda: vocabulary_of(Tokenizer(train_byte_level(), {})))
    with pytest.raises(InvalidParameter) as caught:
        probe(compiler, constraint)
    assert caught.value.details["field"] == constraint.kind
    assert len(caught.value.message) < 300


async def test_the_sandbox_ends_what_would_not_end_and_goes_on() -> None:
    sandbox = Sandbox(vocabulary_of(Tokenizer(train_byte_level(), {})))
    fine = Constraint("regex", ("[a-f]{3}",))
    try:
        await sandbox.check(fine)
        bad = [SLOW, DEEP, Constraint("regex", ("a(",))]
        outcomes = await asyncio.gather(
            *(sandbox.check(each) for each in [*bad, fine, *bad, fine]), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [*[InvalidParameter] * 3, type(None)] * 2
        assert "takes too much time or memory" in str(outcomes[0])
        assert "nested too deep" in str(outcomes[1])
        assert re.match(r"regex cannot be kept to: .*invalid regex", str(outcomes[2]))
    finally:
        await sandbox.close()


async def test_a_sandbox_that_dies_is_started_again() -> None:
    sandbox = Sandbox(vocabulary_of(Tokenizer(train_byte_level(), {})))
    fine = Constraint("regex", ("[a-f]{3}",))
    try:
        await sandbox.check(fine)
        assert sandbox._process is not None
        asked = asyncio.create_task(sandbox.check(SLOW))
        await asyncio.sleep(0.05)
        os.kill(sandbox._process.pid, 9)
        with pytest.raises(Overloaded):
            await asked
        await sandbox.check(fine)
        pid = sandbox._process.pid
    finally:
        await sandbox.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
