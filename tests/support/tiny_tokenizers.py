"""Tokenizers trained here, as tokenizer.json and as GGUF have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "Once upon a time there was a little girl who didn't like 1234 apples, or 42 pears.",
    "Über den Wolken muß die Freiheit wohl grenzenlos sein; çà et là, naïve cafés.",
    "def add(a, b):\n    return a + b  # plus\n",
    "日本語のテキストと絵文字 🎉🚀👩‍👩‍👧 が混ざる。",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, " 1234 42 1234" * 9], trainer)
    assert "Ġ1234" in backend.get_vocab(), "only the pre-tokenizer keeps digits apart"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return backend


def train_sentencepiece_like() -> tokenizers.Tokenizer:
    """As Llama 2's tokenizer.json: "▁" for spaces, byte fallback, `<s>` in front. Ids are in no order of the merges."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocabulary = {token: at for at, token in enumerate([*ordered[: len(special)], *ordered[: len(special) - 1 : -1]])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True) for token in special[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def write_tokenizer_gguf(path: Path, backend: tokenizers.Tokenizer, kind: str, **more: Any) -> Path:
    """What llama.cpp's converter writes of a tokenizer."""
    definition = json.loads(backend.to_str())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    special = {token["content"] for token in definition["added_tokens"] if token["special"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    kinds = [3 if token in special else 6 if kind == "llama" and token.startswith("<0x") else 1 for token in tokens]
    writer.add_token_types(kinds)
    if kind == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in definition["model"]["merges"]])
    else:
        rank = {left + right: rank for rank, (left, right) in reversed(list(enumerate(definition["model"]["merges"])))}
        writer.add_token_scores([-1.0 - rank.get(token, 10_000) for token in tokens])
    for key, value in more.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
