"""Values of a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spec.errors import InvalidModel

Config = Mapping[str, Any]


def whole(config: Config, key: str, default: int | None = None) -> int:
    """A whole number; `default` where the key is missing or null. Raises InvalidModel for what is none, KeyError where
    there is no default."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise InvalidModel(f"config.json: {key} must be a whole number, is {value!r}")
    return int(value)
