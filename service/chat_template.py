"""A model's own chat template, rendered as transformers renders it.

Sandboxed jinja2 with trimmed blocks, `raise_exception`, `strftime_now`, `tojson`, loop controls, and `{% generation %}`
blocks, which only mark text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes, parser

from spec.errors import InvalidModel, InvalidParameter


class ChatTemplate:
    """Raises InvalidModel for a template that is no jinja2."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self.source = source
        self._special_tokens = dict(special_tokens)  # bos_token, eos_token, ...
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidModel(f"the model's chat template is no valid jinja2: {error}") from None

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True) -> str:
        """Messages are {"role": ..., "content": ...}. Raises InvalidParameter with the template's own words when it
        refuses them (roles that do not alternate, say)."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except jinja2.TemplateError as error:
            raise InvalidParameter(f"are refused by the model's chat template: {error}", field="messages") from None
        except (TypeError, ValueError, KeyError, ArithmeticError, AttributeError) as error:
            raise InvalidParameter(f"do not fit the model's chat template: {error}", field="messages") from None


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant said, for training; here it is plain text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """As transformers': jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
