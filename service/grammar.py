"""Constraints compiled with llguidance (Microsoft, https://github.com/guidance-ai/llguidance): an Earley parser over
derivatives of regular expressions, run along the trie of the vocabulary.

Its limits bound what a mask takes. Compiling is bounded too, but for sums of small things: an expression of some
hundred bytes can take half a minute, and one nested some thousand deep overflow the stack. So a router compiles what a
client sends in a process of its own first (service/sandbox.py), and workers are handed what came through there.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from spec.constraint import Constraint
from spec.errors import UnsupportedModel

# The library's own where it has none here. Fuel: about 50 units a microsecond to compile, 14 in a mask.
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Between JSON's tokens: nothing, a space, or a line break and its indentation; so that whitespace ends.
_JSON_WHITESPACE = r"\x20|\n\x20{0,16}"


@dataclasses.dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokens mean, and which end an answer. `definition` is the content of a tokenizer.json."""

    definition: str
    vocab_size: int  # of the model's head, which may be wider than the tokenizer
    eos_token_ids: tuple[int, ...]


class Compiler:
    """Reads the vocabulary when it is needed first, a second for 50,000 tokens. Calls are safe from any thread."""

    def __init__(self, read: Callable[[], Vocabulary]) -> None:
        self._read = read
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()

    def prepare(self) -> LLTokenizer:
        """Raises UnsupportedModel for a tokenizer whose tokens have no bytes of their own."""
        with self._lock:
            if self._tokenizer is None:
                given = self._read()
                try:
                    definition, size = _with_end_tokens(given)
                    self._tokenizer = LLTokenizer(
                        definition, n_vocab=max(given.vocab_size, size), eos_token=list(given.eos_token_ids) or None
                    )
                except Exception as error:  # the library raises what it likes
                    raise UnsupportedModel(f"the model's tokenizer cannot be held to a constraint: {error}") from None
            return self._tokenizer

    def compile(self, constraint: Constraint) -> LLMatcher:
        """The matcher of an answer that has no token yet, its first mask found. Raises InvalidParameter."""
        try:
            tokenizer = self.prepare()
        except UnsupportedModel as error:
            raise constraint.refusal(f"cannot be kept to: {error.message}") from None
        matcher = LLMatcher(tokenizer, grammar_of(constraint), limits=LIMITS, log_level=0)
        bits = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise constraint.refusal(f"cannot be kept to: {_first_line(matcher.get_error())}")
        if not any(bits):
            raise constraint.refusal("admits no answer")
        return matcher


def _with_end_tokens(vocabulary: Vocabulary) -> tuple[str, int]:
    """(a tokenizer.json in which the tokens that end an answer are special, and so never part of its text; its size)"""
    definition = json.loads(vocabulary.definition)
    model = definition["model"]["vocab"]
    texts = {token_id: text for text, token_id in model.items()} if isinstance(model, dict) else {}
    added = {token["id"]: token for token in definition["added_tokens"]}
    size = max([len(model), *(token_id + 1 for token_id in added)])
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for token_id in vocabulary.eos_token_ids:
        if token_id in texts or token_id in added:
            token = added.get(token_id) or {"id": token_id, "content": texts[token_id], **plain}
            added[token_id] = token | {"special": True}
    definition["added_tokens"] = [added[token_id] for token_id in sorted(added)]
    return json.dumps(definition), size


def grammar_of(constraint: Constraint) -> str:
    """In llguidance's notation. Raises InvalidParameter for what it does not read at all."""
    try:
        match constraint.kind:
            case "json_schema":
                schema = {"true": "{}", "false": '{"enum": []}'}.get(constraint.texts[0].strip(), constraint.texts[0])
                return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _JSON_WHITESPACE})
            case "regex":
                return LLMatcher.grammar_from_regex(constraint.texts[0])
            case "choice":
                alternatives = " | ".join(json.dumps(text) for text in constraint.texts)
                return LLMatcher.grammar_from_lark(f"start: ANSWER\nANSWER: {alternatives}\n")
            case "grammar":
                return LLMatcher.grammar_from_lark(constraint.texts[0])
    except ValueError as error:
        raise constraint.refusal(f"cannot be read: {_first_line(str(error))}") from None


def probe(compiler: Compiler, constraint: Constraint, num_tokens: int = 24) -> None:
    """Compiles it, and walks a way through it: the lexer builds its states on the way. Raises InvalidParameter."""
    matcher = compiler.compile(constraint)
    for step in range(num_tokens):
        bits = matcher.compute_bitmask()
        allowed = [at for at, byte in enumerate(bits) if byte]
        if matcher.is_error() or not allowed:
            break
        place = allowed[step * 7919 % len(allowed)]
        token_id = place * 8 + (bits[place] & -bits[place]).bit_length() - 1
        if matcher.is_stopped() or not matcher.consume_token(token_id):
            break
    if matcher.is_error():
        raise constraint.refusal(f"is too complex: {_first_line(matcher.get_error())}")


def _first_line(text: str) -> str:
    return text.partition("\n")[0][:200]
