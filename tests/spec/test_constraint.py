"""What is refused of a constraint before anything compiles it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spec.constraint import MAX_CONSTRAINT_BYTES, MAX_SCHEMA_DEPTH, Constraint
from spec.errors import InvalidParameter
from spec.sampling import SamplingParams


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"properties": {"not": {"enum": ["if"]}, "anyOf": {}}, "required": ["not"]},  # names, no keywords
        {"const": {"if": 1}, "default": {"not": {}}, "examples": [{"then": 1}]},
        {"x-order": 3, "anyOf": [{"items": [{}, True]}, {"items": False}], "$defs": {"a": {"title": "b"}}},
        nested(MAX_SCHEMA_DEPTH),
    ],
)
def test_schemas_that_are_let_pass(schema: Any) -> None:
    Constraint("json_schema", (json.dumps(schema),)).validate()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("[" * 60_000, "is no JSON"),
        ("1", "holds 1 where a schema belongs"),
        ('{"properties": {"a": 7}}', "holds 7 where a schema belongs"),
        ('{"anyOf": [{"if": {}}]}', "holds the keyword 'if'"),
        ('{"items": {"additionalProperties": {"uniqueItems": true}}}', "holds the keyword 'uniqueItems'"),
        ('{"items": [{"contains": {}}]}', "holds the keyword 'contains'"),
        ('{"$defs": {"a": {"x-guidance": {}}}}', "holds the keyword 'x-guidance'"),
        (json.dumps(nested(MAX_SCHEMA_DEPTH + 1)), "is nested more than 64 schemas deep"),
        (json.dumps({"title": "é" * (MAX_CONSTRAINT_BYTES // 2)}, ensure_ascii=False), "bytes are taken"),
    ],
)
def test_schemas_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidParameter, match=said) as caught:
        Constraint("json_schema", (text,)).validate()
    assert caught.value.details["field"] == "json_schema"


def test_texts_are_counted() -> None:
    Constraint("choice", ("a",) * 4096).validate()
    for kind, texts in (("choice", ("a",) * 4097), ("choice", ()), ("regex", ("a", "b")), ("grammar", ("a" * 65537,))):
        with pytest.raises(InvalidParameter) as caught:
            Constraint(kind, texts).validate()  # type: ignore[arg-type]
        assert caught.value.details["field"] == kind


def test_what_goes_on_behind_the_end_keeps_to_nothing() -> None:
    constraint = Constraint("regex", ("a",))
    SamplingParams(constraint=constraint).validate(10)
    with pytest.raises(InvalidParameter, match="ignore_eos cannot be asked for together with regex"):
        SamplingParams(constraint=constraint, ignore_eos=True).validate(10)
