"""Trace files, plain or gzipped, told apart by what they hold.

    Mooncake    a JSON object a line: timestamp (ms), input_length, output_length, hash_ids (a name for each 512 tokens
                of the prompt; equal names are equal tokens). github.com/kvcache-ai/Mooncake, FAST'25
    Azure       CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens. github.com/Azure/AzurePublicDataset

Lengths can be scaled, so that a trace of a large model's traffic loads a small one.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import gzip
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from legato.bench.arrivals import Arrival
from legato.errors import InvalidParameter

BLOCK_TOKENS = 512  # of a Mooncake hash id
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_trace(path: Path, speed: float = 1.0) -> list[Arrival]:
    """In order of time; the first comes at 0, the others `speed` times as fast as recorded. Lengths are at least 1.

    Raises InvalidParameter that names the line.
    """
    lines = read_lines(path, "trace")
    first = lines[0].lstrip("\ufeff").lstrip() if lines else ""
    if first.startswith("{"):
        arrivals = list(_mooncake(path, lines))
    elif all(column in first.split(",") for column in _AZURE_COLUMNS):
        arrivals = list(_azure(path, [first, *lines[1:]]))
    else:
        raise _wrong(f"{path} is neither a Mooncake trace (JSON lines) nor an Azure one ({','.join(_AZURE_COLUMNS)})")
    if not arrivals:
        raise _wrong(f"{path} holds no request")
    arrivals.sort(key=lambda arrival: arrival.at_s)
    start_s = arrivals[0].at_s
    return [dataclasses.replace(one, at_s=(one.at_s - start_s) / speed) for one in arrivals]


def read_lines(path: Path, field: str) -> list[str]:
    """Lines of a text file, unpacked where it is gzipped. Raises InvalidParameter."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _wrong(f"{path} cannot be read: {reason}", field) from None


def fitting_scale(arrivals: Sequence[Arrival], context_tokens: int, keeps_outputs: bool = False) -> float:
    """The largest factor, at most 1, with which every prompt and its answer fit into `context_tokens`; 0 where answers
    that are kept leave no room.

    A token less than the context: each of the two may be rounded up."""
    room = context_tokens - 1
    kept = [one.output_tokens if keeps_outputs else 0 for one in arrivals]
    scaled_tokens = [(one.prompt_tokens or 0) + (0 if keeps_outputs else one.output_tokens) for one in arrivals]
    return max(0.0, min(1.0, *((room - fixed) / tokens for fixed, tokens in zip(kept, scaled_tokens, strict=True))))


def scaled(arrivals: Sequence[Arrival], factor: float, keeps_outputs: bool = False) -> list[Arrival]:
    return [
        dataclasses.replace(
            one,
            prompt_tokens=None if one.prompt_tokens is None else max(1, round(one.prompt_tokens * factor)),
            output_tokens=one.output_tokens if keeps_outputs else max(1, round(one.output_tokens * factor)),
        )
        for one in arrivals
    ]


def scaled_block_tokens(factor: float) -> int:
    """Tokens of a hash id in a scaled trace; rounded up, so that the blocks of a prompt always cover it."""
    return max(1, math.ceil(BLOCK_TOKENS * factor))


def _mooncake(path: Path, lines: list[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with _naming(path, number):
            arrival = _mooncake_arrival(json.loads(line))
        yield arrival


def _mooncake_arrival(row: Any) -> Arrival:
    prompt_tokens, prefix_ids = int(row["input_length"]), tuple(int(name) for name in row.get("hash_ids", ()))
    if prefix_ids and len(prefix_ids) * BLOCK_TOKENS < prompt_tokens:
        raise ValueError(f"{len(prefix_ids)} hash_ids do not cover {prompt_tokens} tokens")
    return _arrival(float(row["timestamp"]) / 1e3, prompt_tokens, int(row["output_length"]), prefix_ids)


def _azure(path: Path, lines: list[str]) -> Iterator[Arrival]:
    for number, row in enumerate(csv.DictReader(lines), 2):
        with _naming(path, number):
            arrival = _azure_arrival(row)
        yield arrival


def _azure_arrival(row: Any) -> Arrival:
    moment = datetime.datetime.fromisoformat(row["TIMESTAMP"])
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return _arrival(moment.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]), ())


def _arrival(at_s: float, prompt_tokens: int, output_tokens: int, prefix_ids: tuple[int, ...]) -> Arrival:
    if prompt_tokens < 0 or output_tokens < 0 or not math.isfinite(at_s):
        raise ValueError("a time or a length is negative or not finite")
    return Arrival(at_s, max(1, prompt_tokens), max(1, output_tokens), prefix_ids)


@contextlib.contextmanager
def _naming(path: Path, number: int) -> Iterator[None]:
    """What a line has wrong is said with its number."""
    try:
        yield
    except KeyError as error:
        raise _wrong(f"{path}:{number}: {error.args[0]} is missing") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _wrong(f"{path}:{number}: {error}") from None


def _wrong(message: str, field: str = "trace") -> InvalidParameter:
    return InvalidParameter(message, details={"field": field})
