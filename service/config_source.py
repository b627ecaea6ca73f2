"""Where a configuration comes from: a YAML file, then environment variables over it; and how its mistakes are told."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from spec.errors import InvalidConfiguration

ENVIRONMENT_PREFIX = "LEGATO_"
NESTING = "__"
SECRET_KEYS = frozenset({"cluster_key", "api_keys", "redis_url"})  # their values are never shown

Model = TypeVar("Model", bound=BaseModel)


def load(model: type[Model], path: Path | None, environment: Mapping[str, str]) -> Model:
    """The file's keys, then the environment's over them: `LEGATO_ENGINE__THREADS` is `engine.threads`; "" is none.

    Raises InvalidConfiguration with every mistake: the key's path, the variable, or the line in the file.
    """
    keys = _read_yaml(path) if path is not None else {}
    variables = _overlay(keys, environment)
    try:
        return model.model_validate(keys)
    except ValidationError as error:
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        mistakes = [_mistake(model, detail, variables) for detail in details]
        where = f"{path}: " if path is not None else ""
        first = ".".join(str(part) for part in details[0]["loc"])
        raise InvalidConfiguration(where + "; ".join(mistakes), key=first) from None


class _Loader(yaml.SafeLoader):
    """A key given twice is a mistake; plain YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _value in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidConfiguration(f"the configuration {path} cannot be read: {reason}") from None
    try:
        keys = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InvalidConfiguration(f"{path}{line}: {problem}") from None
    if keys is None:
        return {}
    if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
        raise InvalidConfiguration(f"{path}: the configuration is a mapping of keys, this is a {type(keys).__name__}")
    return keys


def _overlay(keys: dict[str, Any], environment: Mapping[str, str]) -> dict[str, str]:
    """Writes the variables into `keys`; returns {dotted path: variable} for messages."""
    origin: dict[str, str] = {}
    for variable, value in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or not value:
            continue
        *sections, last = variable.removeprefix(ENVIRONMENT_PREFIX).lower().split(NESTING)
        place = keys
        for section in sections:
            inner = place.get(section)
            if inner is None:
                inner = place[section] = {}
            if not isinstance(inner, dict):
                raise InvalidConfiguration(f"{variable} sets a key inside {section}, which is not a section")
            place = inner
        place[last] = value
        origin[".".join([*sections, last])] = variable
    return origin


def _mistake(model: type[BaseModel], detail: ErrorDetails, variables: Mapping[str, str]) -> str:
    location = [str(part) for part in detail["loc"] if part != "[key]"]
    path = ".".join(location)
    around = [".".join(location[:end]) for end in range(len(location), 0, -1)]  # a variable may hold a list, a mapping
    variable = next((variables[place] for place in around if place in variables), None)
    name = f"{path} ({variable})" if variable else path
    if detail["type"] == "extra_forbidden":
        near = _nearest(model, location)
        return f"unknown key {name}" + (f"; did you mean {near}?" if near else "")
    if detail["type"] == "missing":
        return f"{name} is required"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    shown = detail["input"]
    if isinstance(shown, str | int | float) and not SECRET_KEYS & set(location):
        return f"{name}: {message}, is {shown!r}"
    return f"{name}: {message}" if name else message


def _nearest(model: type[BaseModel], location: list[str]) -> str | None:
    """The nearest key beside the unknown one, else the one of that name in another section."""
    known = dict(_paths(model))
    *sections, last = location
    beside = [path for path in known if path.split(".")[:-1] == sections]
    close = difflib.get_close_matches(last, [path.split(".")[-1] for path in beside], n=1)
    if close:
        return ".".join([*sections, close[0]])
    elsewhere = difflib.get_close_matches(last, known.values(), n=1, cutoff=0.75)
    return next((path for path, key in known.items() if elsewhere and key == elsewhere[0]), None)


def _paths(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted path, key) of every key, outer ones first."""
    inner: list[tuple[str, type[BaseModel]]] = []
    for key, field in model.model_fields.items():
        yield prefix + key, key
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                inner.append((key, kind))
    for key, kind in inner:
        yield from _paths(kind, f"{prefix}{key}.")
