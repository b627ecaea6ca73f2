"""Requests made of real text, to the token where a length is asked for.

A prompt as long as its text is sent as a person would send it: under the model's chat template where it has one. One of
a given length is sent as token ids: texts of the set, one behind the other in drawn order, cut to the length.

Every prompt, and every named block of a trace, begins with a number of its own and of its run. Otherwise the second use
of a text, or the same run a second time, would be answered from the prefix cache, and a run would measure that.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from legato.bench.arrivals import Arrival
from legato.bench.corpus import PROMPTS
from legato.bench.traces import read_lines
from legato.errors import InvalidParameter
from legato.types import Message, Model

MOST_TEXTS = 256  # of a large set: enough words for any length, and few enough to tokenize before a run
Prompt = str | list[int] | list[Message]


def read_prompts(path: Path | None) -> tuple[str, ...]:
    """First turns of a JSON-lines file as MT-Bench has it ({"turns": [...]}), or with {"prompt": ...}; None: our own.

    Raises InvalidParameter that names the line.
    """
    if path is None:
        return PROMPTS
    texts = [_text(path, number, line) for number, line in enumerate(read_lines(path, "prompts"), 1) if line.strip()]
    if not texts:
        raise InvalidParameter(f"{path} holds no prompt", details={"field": "prompts"})
    return tuple(texts)


def _text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
        text = row["turns"][0] if "turns" in row else row["prompt"]
    except (ValueError, TypeError, LookupError):
        text = None
    if not isinstance(text, str) or not text.strip():
        wanted = '{"turns": ["...", ...]} or {"prompt": "..."}'
        raise InvalidParameter(f"{path}:{number}: is not {wanted}", details={"field": "prompts"})
    return text


@dataclasses.dataclass(frozen=True)
class TokenTexts:
    """The set as token ids of the model.

    start   what the tokenizer puts before every text (a begin-of-sequence token), once for each prompt
    digits  tokens of "0" to "9": numbers are put together from them, without asking the tokenizer again
    texts   without `start`
    """

    start: tuple[int, ...]
    digits: tuple[tuple[int, ...], ...]
    texts: tuple[tuple[int, ...], ...]

    @classmethod
    async def ask(cls, client: Any, model: str, texts: Sequence[str], seed: int) -> TokenTexts:
        """From the cluster's tokenizer; `client` is a legato.AsyncClient. Raises classes of legato.errors."""
        digits = [await client.tokenize(str(digit), model=model) for digit in range(10)]
        asked = random.Random(seed).sample(texts, min(len(texts), MOST_TEXTS))
        found = [await client.tokenize(f"\n\n{text}", model=model) for text in asked]
        cut = _length_of_common_start([*digits, *found])
        return cls(
            start=tuple(digits[0][:cut]),
            digits=tuple(tuple(one[cut:]) for one in digits),
            texts=tuple(tuple(one[cut:]) for one in found),
        )

    def passage(self, number: int, nonce: int, num_tokens: int, uniform: random.Random) -> list[int]:
        """`num_tokens` tokens that begin with the number, its last digit first, and the nonce: where a block is so
        short that it cuts these, most still differ."""
        label = str(number)[::-1] + str(nonce)
        passage = list(itertools.chain.from_iterable(self.digits[int(digit)] for digit in label))
        while len(passage) < num_tokens:
            for place in uniform.sample(range(len(self.texts)), len(self.texts)):
                passage.extend(self.texts[place])
                if len(passage) >= num_tokens:
                    break
        return passage[:num_tokens]


def _length_of_common_start(lists: Sequence[Sequence[int]]) -> int:
    same = (len(set(column)) == 1 for column in zip(*lists, strict=False))
    return sum(itertools.takewhile(bool, same))


@dataclasses.dataclass(frozen=True)
class PromptBook:
    """Makes the prompt of a request: the same for the same seed, nonce, index and arrival. The nonce changes only how a
    prompt begins.

    tokens          needed where arrivals name lengths
    block_tokens    of one of an arrival's prefix_ids
    """

    model: Model
    texts: tuple[str, ...]
    tokens: TokenTexts | None
    seed: int
    nonce: int
    block_tokens: int

    def prompt(self, index: int, arrival: Arrival) -> Prompt:
        if arrival.prompt_tokens is None:
            return self._as_written(index)
        assert self.tokens is not None, "lengths are asked for, so the tokenizer was asked"
        if arrival.prefix_ids:
            blocks = (self._block(self.tokens, name) for name in arrival.prefix_ids)
            body = list(itertools.chain.from_iterable(blocks))
        else:
            uniform = random.Random(f"{self.seed}/prompt/{index}")
            body = self.tokens.passage(index, self.nonce, arrival.prompt_tokens, uniform)
        return [*self.tokens.start, *body][: arrival.prompt_tokens]

    def _as_written(self, index: int) -> Prompt:
        """Each text of the set once in drawn order, then again in another."""
        turn, place = divmod(index, len(self.texts))
        order = random.Random(f"{self.seed}/order/{turn}").sample(range(len(self.texts)), len(self.texts))
        text = f"{self.nonce}-{index}. {self.texts[order[place]]}"
        return [Message(role="user", content=text)] if self.model.chat else text

    def _block(self, tokens: TokenTexts, name: int) -> list[int]:
        return tokens.passage(name, self.nonce, self.block_tokens, random.Random(f"{self.seed}/block/{name}"))
