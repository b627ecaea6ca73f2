"""Values of a Hugging Face `config.json` or `generation_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spec.errors import InvalidModel

Config = Mapping[str, Any]
MAX_TOKEN_ID = 2**31 - 1


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


def token_ids(config: Config, key: str) -> tuple[int, ...]:
    """One id or a list of them; none where the key is missing or null. Raises InvalidModel for what is no id."""
    value = config.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(one) is int and 0 <= one <= MAX_TOKEN_ID for one in ids):
        raise InvalidModel(f"{key} must be a token id or a list of them, is {value!r}")
    return tuple(ids)
