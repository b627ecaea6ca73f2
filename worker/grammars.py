"""The constraints of a rank: engine/grammar.py, with service/grammar.py to compile for it."""

from __future__ import annotations

from engine.grammar import Grammars
from engine.model_base import ModelFiles
from service.grammar import Compiler, Vocabulary
from service.tokenizer import load_tokenizer
from spec.shard import RankShard


def grammars_of(files: ModelFiles, shard: RankShard, max_sequences: int) -> Grammars:
    """Reads the tokenizer when the first constraint comes, and not before."""

    def vocabulary() -> Vocabulary:
        definition = load_tokenizer(files.path).definition
        return Vocabulary(definition, files.spec.vocab_size, files.spec.eos_token_ids)

    return Grammars(Compiler(vocabulary).compile, shard.vocab, max_sequences)
