"""What an answer must match, as data. Here its sizes and a schema's keywords are looked at, without a tokenizer; the
grammar itself is judged where it is compiled (service/grammar.py)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, Literal

from spec.errors import InvalidParameter

ConstraintKind = Literal["json_schema", "regex", "choice", "grammar"]

MAX_CONSTRAINT_BYTES = 64 * 1024
MAX_ANSWERS_TO_CHOOSE = 4096
MAX_SCHEMA_DEPTH = 64

# Keywords of JSON Schema that are kept to, and those that ask for nothing. Any other is refused: it would promise what
# the answer need not hold to. "x-" begins a note of the sender's.
_ONE_SCHEMA = {"items", "additionalItems", "additionalProperties"}
_LISTS_OF_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
_KEPT = {
    *("type", "enum", "const", "$ref", "required", "minProperties", "maxProperties", "minItems", "maxItems"),
    *("minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_NOTES = {
    *("title", "description", "default", "examples", "$schema", "$id", "id", "$comment", "readOnly", "writeOnly"),
    *("deprecated", "discriminator"),
}
_KEYWORDS = _ONE_SCHEMA | _LISTS_OF_SCHEMAS | _NAMED_SCHEMAS | _KEPT | _NOTES


@dataclasses.dataclass(frozen=True, slots=True)
class Constraint:
    """`texts`: the answers to choose among for "choice"; one text for every other kind.

    json_schema   a JSON schema (2020-12), as JSON; {} is any JSON, {"type": "object"} any object. Properties come in
                  the schema's order, and between them at most a space, or a line break and its indentation
    regex         a regular expression that the whole answer matches, without look-around and back-references
    choice        the answer is one of the texts
    grammar       a context-free grammar in Lark's notation, from the rule `start`
    """

    kind: ConstraintKind
    texts: tuple[str, ...]

    def validate(self) -> None:
        """Raises InvalidParameter with the kind as its field. Time is linear in the size, which is bounded."""
        if not self.texts or len(self.texts) > (MAX_ANSWERS_TO_CHOOSE if self.kind == "choice" else 1):
            raise self.refusal(f"holds {len(self.texts)} texts; 1 to {MAX_ANSWERS_TO_CHOOSE} are taken")
        characters = sum(map(len, self.texts))  # never more than bytes, and counted at once
        if characters > MAX_CONSTRAINT_BYTES or sum(len(text.encode()) for text in self.texts) > MAX_CONSTRAINT_BYTES:
            raise self.refusal(f"has {characters} characters; at most {MAX_CONSTRAINT_BYTES} bytes are taken")
        if self.kind == "json_schema":
            self._check_schema()

    def refusal(self, message: str) -> InvalidParameter:
        """The error of a constraint that cannot be kept to."""
        return InvalidParameter(message, field=self.kind)

    def _check_schema(self) -> None:
        try:
            root = json.loads(self.texts[0])
        except (ValueError, RecursionError) as error:
            raise self.refusal(f"is no JSON: {error}") from None
        level = [root]
        for _ in range(MAX_SCHEMA_DEPTH):
            for schema in level:
                if not isinstance(schema, dict | bool):
                    raise self.refusal(f"holds {json.dumps(schema)[:60]} where a schema belongs")
                for keyword in schema if isinstance(schema, dict) else ():
                    if keyword not in _KEYWORDS and (not keyword.startswith("x-") or keyword == "x-guidance"):
                        raise self.refusal(f"holds the keyword {keyword[:60]!r}, which is not supported")
            level = [inner for schema in level if isinstance(schema, dict) for inner in _inner_schemas(schema)]
            if not level:
                return
        raise self.refusal(f"is nested more than {MAX_SCHEMA_DEPTH} schemas deep")


def _inner_schemas(schema: dict[str, Any]) -> Iterator[Any]:
    for keyword, value in schema.items():
        if keyword in _LISTS_OF_SCHEMAS and isinstance(value, list):
            yield from value
        elif keyword in _NAMED_SCHEMAS and isinstance(value, dict):
            yield from value.values()
        elif keyword in _ONE_SCHEMA:
            yield value
