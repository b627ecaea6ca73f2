"""Answers under a constraint, through the whole cluster. The oracles are jsonschema, re, and Python's own parser."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cluster import Cluster, cluster
from tiny_llama import SHAPES, make_llama

import legato
from decode_svc.placements import Placements
from engine.convert import convert_gguf
from scheduler.events import Event, Tokens
from service.model_source import resolve_model
from service.tokenizer import load_tokenizer
from spec.errors import WorkerLost

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "bb", None, 1.5]}, "maxItems": 3},
        "inner": {"$ref": "#/$defs/inner"},
    },
    "required": ["name", "age", "inner"],
    "additionalProperties": False,
    "$defs": {
        "inner": {"anyOf": [{"type": "boolean"}, {"type": "array", "prefixItems": [{"const": "é"}], "items": False}]}
    },
}
REGEX = r"[A-Z][a-z]{0,3}(-[0-9]{2,4}|!)"
CHOICE = ["yes", 'no, "never"\n', "übel", "yesterday"]
ARITHMETIC = """
start: sum
sum: product | sum ("+" | "-") product
product: atom | product "*" atom
atom: NUMBER | "(" sum ")"
NUMBER: /[1-9][0-9]{0,2}/
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "model", SHAPES[0])


async def answers(running: Cluster, seeds: Iterable[int], **options: Any) -> list[legato.types.Answer]:
    """One for each seed, at temperatures from 0 to 2."""
    options = {"max_tokens": 200, **options}
    asked = (
        running.client.generate([5, 6, 7 + seed % 50], seed=seed, temperature=seed % 9 / 4, **options) for seed in seeds
    )
    return await asyncio.gather(*asked)


def text_of(answer: legato.types.Answer) -> str:
    """Without the end token, which the small tokenizer does not know for a special one."""
    return answer.text.removesuffix("</s>") if answer.token_ids[-1] == 2 else answer.text


def is_person(text: str) -> bool:
    jsonschema.Draft202012Validator(PERSON).validate(json.loads(text))
    return True


def is_arithmetic(text: str) -> bool:
    tree = ast.parse(text, mode="eval")
    allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Constant)
    return " " not in text and all(isinstance(node, allowed) for node in ast.walk(tree))


CONSTRAINTS: dict[str, tuple[dict[str, Any], Callable[[str], bool]]] = {
    "json_schema": ({"json_schema": PERSON}, is_person),
    "object": ({"json_schema": {"type": "object"}}, lambda text: isinstance(json.loads(text), dict)),
    "regex": ({"regex": REGEX}, lambda text: re.fullmatch(REGEX, text) is not None),
    "choice": ({"choice": CHOICE}, lambda text: text in CHOICE),
    "grammar": ({"grammar": ARITHMETIC}, is_arithmetic),
}


async def test_answers_keep_to_their_constraints_at_any_temperature(model: Path, redis_url: str) -> None:
    async with cluster(model, redis_url) as running:
        for name, (constraint, keeps) in CONSTRAINTS.items():
            least = 20 if name in ("object", "grammar") else 71  # these rarely end by themselves
            found = await answers(running, range(108 if least == 20 else 72), **constraint)
            whole = [answer for answer in found if answer.finish_reason == "stop"]
            assert all(keeps(text_of(answer)) for answer in whole), name
            assert all(len(answer.token_ids) == 200 for answer in found if answer.finish_reason != "stop"), name
            assert len(whole) > least, f"{name}: {len(whole)}"
            assert len({text_of(answer) for answer in whole}) > {"choice": 3, "object": 5}.get(name, 10), name
            assert any(answer.route.decode_worker_id and answer.route.transfer is not None for answer in found), name
        await running.assert_as_at_start()


async def test_the_same_with_every_other_option(model: Path, redis_url: str) -> None:
    """Whoever draws, in whatever company, and guessing ahead: the tokens are those that are drawn alone."""
    options: dict[str, Any] = {
        "json_schema": PERSON,
        "top_k": 40,
        "top_p": 0.98,
        "min_p": 1e-4,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "logit_bias": {2: 50.0, 100: -3.0},
        "logprobs": 2,
    }
    seeds = range(12)
    async with cluster(model, redis_url) as running:
        alone = [(await answers(running, [seed], **options))[0] for seed in seeds]
        guessed = await answers(running, seeds, speculation="prompt_lookup", ngram=1, **options)
        several = await running.client.generate([5, 6, 7], seed=0, temperature=0.0, n=3, max_tokens=200, **options)
        await running.assert_as_at_start()
    async with cluster(model, redis_url, prefill=0) as running:
        one_pool = await answers(running, seeds, **options)
    expected = [answer.token_ids for answer in alone]
    assert all(answer.finish_reason == "stop" and is_person(answer.text) for answer in alone)
    assert all(answer.logprobs is not None and len(answer.logprobs) == len(answer.token_ids) for answer in alone)
    for others in (guessed, one_pool):
        assert [answer.token_ids for answer in others] == expected
    assert sum(answer.usage.accepted_tokens for answer in guessed) > 0
    assert all(is_person(choice.text) for choice in several.choices)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
async def test_ranks_that_draw_compile_for_themselves(model: Path, redis_url: str, layout: str) -> None:
    options: dict[str, Any] = {"json_schema": PERSON}
    async with cluster(model, redis_url, prefill=0) as running:
        expected = await answers(running, range(9), **options)
    engine = {"layout": layout, "num_blocks": None, "kv_memory": "4MiB"}
    async with cluster(model, redis_url, prefill=0, engine=engine) as running:
        found = await answers(running, range(9), **options)
        with pytest.raises(legato.errors.InvalidParameter, match="choice is not kept to"):
            await running.client.generate([5, 6], choice=["abc"], forced_token_ids=answers_ids("x", model))
        await running.assert_as_at_start()
    assert [(answer.token_ids, answer.finish_reason) for answer in found] == [
        (answer.token_ids, answer.finish_reason) for answer in expected
    ]
    assert all(is_person(answer.text) for answer in found)


async def test_an_answer_goes_on_where_its_worker_was_lost(
    model: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"json_schema": PERSON, "seed": 11, "temperature": 1.5, "max_tokens": 200}
    dispatch = Placements._dispatch

    def losing(placements: Placements, events: Sequence[Event]) -> None:
        dispatch(placements, events)
        for event in events:
            if isinstance(event, Tokens) and 8 <= event.first_index < 12:
                placements.give_up(event.sequence_id, WorkerLost("planted"))

    async with cluster(model, redis_url, decode=2) as running:
        expected = await running.client.generate([5, 6, 7], **options)
        monkeypatch.setattr(Placements, "_dispatch", losing)
        stream = running.client.stream([5, 6, 7], **options)
        tokens = [token_id async for piece in stream for token_id in piece.token_ids]
        assert stream.answer.route.attempts > 1
        assert tuple(tokens) == expected.token_ids
        assert is_person(stream.answer.text)
        await running.assert_as_at_start()


async def test_max_tokens_cuts_and_a_whole_answer_needs_no_end_token(model: Path, redis_url: str) -> None:
    async with cluster(model, redis_url) as running:
        cut = await running.client.generate([5, 6], regex="x{9}", max_tokens=4)
        assert (cut.text, cut.finish_reason) == ("xxxx", "length")
        whole = await running.client.generate([5, 6], regex="x{9}", max_tokens=9)
        assert (whole.text, whole.finish_reason, len(whole.token_ids)) == ("x" * 9, "stop", 9)
        open_ended = await running.client.generate([5, 6], regex="x{3,}", max_tokens=40, logit_bias={2: 100.0})
        assert (text_of(open_ended), open_ended.finish_reason) == ("xxx", "stop")
        stopped = await running.client.generate([5, 6], regex="x{9}y", stop="xxx")
        assert (stopped.text, stopped.finish_reason) == ("", "stop")
        forced = await running.client.generate([5, 6], choice=["abc", "bcd"], forced_token_ids=answers_ids("b", model))
        assert forced.text == "bcd"


def answers_ids(text: str, model: Path) -> list[int]:
    return load_tokenizer(model).encode(text, add_special=False)


NESTED: Any = {"type": "integer"}
for _ in range(80):
    NESTED = {"properties": {"a": NESTED}}
REF_CHAIN = {"$defs": {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(1000)}}
REF_CHAIN |= {"$ref": "#/$defs/d0"}
REF_CHAIN["$defs"]["d1000"] = {}  # type: ignore[index]

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no JSON": ({"json_schema": "{"}, "json_schema"),
    "no schema": ({"json_schema": "[1]"}, "json_schema"),
    "a type that is none": ({"json_schema": {"type": "person"}}, "person"),
    "a keyword that is none": ({"json_schema": {"type": "object", "requierd": ["a"]}}, "requierd"),
    "a keyword that is not kept to": ({"json_schema": {"properties": {"a": {"not": {}}}}}, "'not'"),
    "options of the library": ({"json_schema": {"x-guidance": {"lenient": True}}}, "x-guidance"),
    "nothing is allowed": ({"json_schema": False}, "json_schema"),
    "contradiction": ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 1}}, "json_schema"),
    "endless recursion": ({"json_schema": {"$ref": "#"}}, "json_schema"),
    "a reference to nothing": ({"json_schema": {"$ref": "#/$defs/a"}}, "json_schema"),
    "a reference to the network": ({"json_schema": {"$ref": "http://127.0.0.1:9/schema"}}, "json_schema"),
    "deep nesting": ({"json_schema": NESTED}, "64"),
    "references nested deep": ({"json_schema": REF_CHAIN}, "json_schema"),
    "a schema of a megabyte": ({"json_schema": {"enum": ["x" * 2**20]}}, "65536"),
    "a number of many digits": ({"json_schema": '{"const": ' + "9" * 5000 + "}"}, "json_schema"),
    "a slow number": ({"json_schema": {"type": "integer", "multipleOf": 999_999_937}}, "json_schema"),
    "no regex": ({"regex": "a(b"}, "regex"),
    "look-ahead": ({"regex": "(?=a)b"}, "regex"),
    "a regex of a megabyte": ({"regex": "a" * 2**20}, "65536"),
    "repetition of repetition": ({"regex": "((((a{100}){100}){100}){100})"}, "regex"),
    "half a minute to compile": ({"regex": "".join(f"(a{i}|.*)" for i in range(6000))}, "regex"),
    "no grammar": ({"grammar": "begin: 'a'"}, "grammar"),
    "a rule that is not there": ({"grammar": "start: there"}, "there"),
    "left recursion without end": ({"grammar": "start: start"}, "grammar"),
    "rules nested deep": (
        {"grammar": "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"\n'},
        "grammar",
    ),
    "an intersection": (
        {"grammar": "start: T\nT: " + " & ".join(f"/(.*[a-z]{i}.*)/" for i in range(24))},
        "grammar",
    ),
    "no choice": ({"choice": []}, "choice"),
    "many choices": ({"choice": [str(i) for i in range(5000)]}, "4096"),
    "two at once": ({"choice": ["a"], "regex": "a"}, "together"),
    "beyond the end": ({"choice": ["a"], "ignore_eos": True}, "ignore_eos"),
}


async def test_bad_constraints_get_a_typed_error_and_nothing_else_suffers(model: Path, redis_url: str) -> None:
    async with cluster(model, redis_url) as running:
        good = asyncio.create_task(running.client.generate([9] * 30, max_tokens=150, temperature=0.0, ignore_eos=True))
        for name, (options, word) in BAD.items():
            with pytest.raises(legato.errors.InvalidParameter) as caught:
                await running.client.generate([5, 6, 7], max_tokens=4, **options)
            assert word in str(caught.value), f"{name}: {caught.value}"
            assert not caught.value.retryable, name
        assert len((await good).token_ids) == 150
        assert (await running.client.generate([5], choice=["fine"])).text == "fine"
        await running.assert_as_at_start()


async def test_what_leads_nowhere_fails_alone(model: Path, redis_url: str) -> None:
    """Tokens that are forced upon an answer may break its constraint; so may, in theory, a vocabulary."""
    async with cluster(model, redis_url) as running:
        beside = asyncio.create_task(running.client.generate([9] * 9, choice=["x" * 40], max_tokens=60))
        with pytest.raises(legato.errors.InvalidParameter, match="choice is not kept to"):
            await running.client.generate([5, 6], choice=["abc"], forced_token_ids=answers_ids("x", model))
        assert (await beside).text == "x" * 40
        await running.assert_as_at_start()


async def test_the_real_model(redis_url: str, tmp_path: Path) -> None:
    """Of its 49,152 tokens most are several characters long, and cross the borders of JSON's."""
    gguf = resolve_model("smollm2")
    convert_gguf(gguf, tmp_path / "hf", write_tokenizer=load_tokenizer(gguf).save)
    schema = {
        "type": "object",
        "properties": {"capital": {"type": "string", "maxLength": 12}, "people": {"type": "integer", "minimum": 1}},
        "required": ["capital", "people"],
        "additionalProperties": False,
    }
    messages: list[legato.types.Message] = [{"role": "user", "content": "France's capital, as JSON?"}]
    async with cluster(tmp_path / "hf", redis_url, engine={"dtype": "bfloat16", "num_blocks": 64}) as running:
        asked = (
            running.client.chat(messages, seed=seed, temperature=seed / 4, max_tokens=60, json_schema=schema)
            for seed in range(5)
        )
        found = await asyncio.gather(*asked)
        whole = [answer for answer in found if answer.finish_reason == "stop"]
        assert len(whole) > 3
        for answer in whole:
            jsonschema.validate(json.loads(answer.text), schema)
        await running.assert_as_at_start()
