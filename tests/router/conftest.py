"""A byte-level tokenizer with a chat template, small enough to write down; and a router before toy workers."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from service.text_stream import byte_level_table
from service.tokenizer import Tokenizer
from tests.router.toy_cluster import EOS, ToyRouter

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Ids 0..255 are the bytes, 256 is <eos>, 257.. are merges of two or three letters."""
    stand_in = {byte: character for character, byte in byte_level_table().items()}
    vocabulary = {stand_in[byte]: byte for byte in range(256)}
    vocabulary["<eos>"] = EOS
    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("an", "d")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend, {"eos_token": "<eos>", "chat_template": TEMPLATE})


@pytest.fixture
async def router(tokenizer: Tokenizer) -> AsyncIterator[ToyRouter]:
    async with ToyRouter(tokenizer) as router:
        yield router
