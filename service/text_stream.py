"""Tokens to text, one by one: no half character leaves, and all that left, joined, is what decoding at once gives.

Two rules cover the decoders of tokenizer.json that language models have:
  ByteLevel      a token is bytes (GPT-2's table of printable stand-ins); all together they are UTF-8, faults are U+FFFD
  sentencepiece  a token is text with "▁" for a space, or one byte `<0xNN>`; a run of bytes is UTF-8 as a whole, or
                 one U+FFFD for each; one leading space of the whole text is dropped
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from spec.errors import UnsupportedModel

_SPACE = "\u2581"
_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What each token id stands for. `bytes_of` holds raw bytes, `text_of` finished text; an id is in one of them."""

    bytes_of: Mapping[int, bytes]
    text_of: Mapping[int, str]
    special: frozenset[int]
    runs_are_whole: bool  # sentencepiece: a run of bytes is good or bad as a whole
    drop_leading_space: bool


class TextStream:
    """Of one answer. Unknown ids add nothing, as in decoding all at once."""

    def __init__(self, pieces: Pieces, skip_special: bool) -> None:
        self._pieces = pieces
        self._skip = pieces.special if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()  # sentencepiece: bytes that wait for the run's end
        self._at_start = pieces.drop_leading_space

    def push(self, token_ids: Iterable[int]) -> str:
        """What these tokens add to the text."""
        added = [self._one(token_id) for token_id in token_ids if token_id not in self._skip]
        return self._trimmed("".join(added))

    def finish(self) -> str:
        """What was held back: an unfinished character comes as U+FFFD. The stream ends here."""
        return self._trimmed(self._end_of_run() + self._utf8.decode(b"", final=True))

    def _one(self, token_id: int) -> str:
        raw = self._pieces.bytes_of.get(token_id)
        if raw is not None and self._pieces.runs_are_whole:
            self._run += raw
            return ""
        if raw is not None:
            return self._utf8.decode(raw)
        text = self._pieces.text_of.get(token_id)
        return self._end_of_run() + text if text is not None else ""

    def _end_of_run(self) -> str:
        if not self._run:
            return ""
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _trimmed(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text


def pieces_of(definition: Mapping[str, Any], vocabulary: Mapping[str, int], special: frozenset[int]) -> Pieces:
    """From a parsed tokenizer.json. Raises UnsupportedModel for a decoder that neither rule covers."""
    decoder = definition.get("decoder") or {}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder]) if "type" in step}
    if "ByteLevel" in steps:
        table = byte_level_table()
        raw = {token_id: _raw_bytes(token, table) for token, token_id in vocabulary.items()}
        return Pieces(raw, {}, special, runs_are_whole=False, drop_leading_space=False)
    if not steps or not steps.keys() <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        raise UnsupportedModel(
            f"the tokenizer's decoder {', '.join(steps) or 'None'} is not known; ByteLevel and sentencepiece ones are"
        )
    raw, text = {}, {}
    for token, token_id in vocabulary.items():
        if "ByteFallback" in steps and (match := _BYTE.match(token)):
            raw[token_id] = bytes([int(match[1], 16)])
        else:
            text[token_id] = token.replace(_SPACE, " ")
    trims = "Strip" in steps or steps.get("Metaspace", {}).get("prepend_scheme") == "always"
    return Pieces(raw, text, special, runs_are_whole=True, drop_leading_space=trims)


def byte_level_table() -> dict[str, int]:
    """Stand-in character -> byte, of GPT-2's byte-level BPE (openai/gpt-2 src/encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + index): byte for index, byte in enumerate(hidden)}


def _raw_bytes(token: str, table: Mapping[str, int]) -> bytes:
    """A token with a character outside the table was added by hand, as text."""
    try:
        return bytes([table[character] for character in token])
    except KeyError:
        return token.encode("utf-8")
