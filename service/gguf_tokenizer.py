"""The tokenizer inside a GGUF file, as a tokenizer.json would have it.

The keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from spec.errors import InvalidModel, UnsupportedModel
from spec.gguf import read_header

# Regular expressions of the published tokenizer.json files.
_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPLIT = _GPT4_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """By `tokenizer.ggml.pre`."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in ("gpt-2", "gpt2"):
        return byte_level
    if name == "llama-bpe":
        return _split(_GPT4_SPLIT)
    if name == "qwen2":
        return _split(_QWEN_SPLIT)
    raise UnsupportedModel(f"tokenizer.ggml.pre {name!r} is not known; known are smollm, gpt-2, llama-bpe, qwen2")


def read_gguf(path: Path) -> tuple[Backend, dict[str, Any]]:
    """(tokenizer, what a tokenizer_config.json would hold). Raises InvalidModel, UnsupportedModel."""
    metadata = read_header(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _wanted(metadata, "tokenizer.ggml.tokens", path)
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens, path)
    else:
        raise UnsupportedModel(f"{path}: tokenizer.ggml.model {kind!r} is not known; known are gpt2, llama", file=path)
    types = metadata.get("tokenizer.ggml.token_type", ())
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == _CONTROL:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])
    return backend, _configuration(metadata, tokens, kind)


def _configuration(metadata: Mapping[str, Any], tokens: Sequence[str], kind: str) -> dict[str, Any]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {key: metadata.get(f"tokenizer.ggml.{name}_token_id") for key, name in names.items()}
    configuration: dict[str, Any] = {
        key: tokens[token_id] for key, token_id in found.items() if token_id is not None and token_id < len(tokens)
    }
    # llama.cpp's defaults, where the file is silent: sentencepiece models take a bos, byte-level ones do not
    configuration["add_bos_token"] = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    configuration["add_eos_token"] = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    if template := metadata.get("tokenizer.chat_template"):
        configuration["chat_template"] = template
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        configuration["model_max_length"] = context
    return configuration


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> Backend:
    merges = [_pair(merge, path) for merge in _wanted(metadata, "tokenizer.ggml.merges", path)]
    name = metadata.get("tokenizer.ggml.pre", "gpt-2")
    backend = Backend(_model(models.BPE, tokens, merges, path, ignore_merges=name == "llama-bpe"))
    backend.pre_tokenizer = _pre_tokenizer(name)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], path: Path) -> Backend:
    scores = _wanted(metadata, "tokenizer.ggml.scores", path)
    if len(scores) != len(tokens):
        raise InvalidModel(f"{path}: {len(scores)} tokenizer scores for {len(tokens)} tokens", file=path)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    backend = Backend(
        _model(
            models.BPE,
            tokens,
            list(_merges_by_score(tokens, scores)),
            path,
            unk_token=tokens[unknown] if unknown < len(tokens) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    space = "\u2581"
    prepends = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [*([normalizers.Prepend(space)] if prepends else []), normalizers.Replace(" ", space)]
    backend.normalizer = normalizers.Sequence(steps)
    strip = [decoders.Strip(" ", 1, 0)] if prepends else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges_by_score(tokens: Sequence[str], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """sentencepiece keeps no merges: it joins the neighbours whose whole has the best score.

    So every way to split a token into two known ones is a merge: best whole first, within one by its halves' ids
    (as transformers' SentencePieceExtractor does).
    """
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    found: list[tuple[float, int, int, int]] = []
    for token_id, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-scores[token_id], left, right, token_id))
    for _score, left, right, _token_id in sorted(found):
        yield tokens[left], tokens[right]


def _model(make: Any, tokens: Sequence[str], merges: list[tuple[str, str]], path: Path, **options: Any) -> Any:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    for left, right in merges:  # the library would panic
        if left not in ids or right not in ids or left + right not in ids:
            raise InvalidModel(f"{path}: the merge {left!r} {right!r} is not of known tokens", file=path)
    return make(ids, merges, **options)


def _pair(merge: str, path: Path) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space:
        raise InvalidModel(f"{path}: the merge {json.dumps(merge)} is no pair", file=path)
    return left, right


def _wanted(metadata: Mapping[str, Any], key: str, path: Path) -> Sequence[Any]:
    value = metadata.get(key)
    if not isinstance(value, list | tuple) or not value:
        raise InvalidModel(f"{path} has no {key}", file=path)
    return value
