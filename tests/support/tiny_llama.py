"""Small random Llamas on disk, and what transformers says of them: the oracle of every test that compares logits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


@dataclasses.dataclass(frozen=True)
class Shape:
    """Odd on purpose; `name` is the test's id."""

    name: str
    hidden_size: int = 48
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 12
    intermediate_size: int = 88
    num_hidden_layers: int = 3
    vocab_size: int = 431
    tie_word_embeddings: bool = True
    rope_scaling: dict[str, Any] | None = None
    max_position_embeddings: int = 512
    attention_bias: bool = False
    mlp_bias: bool = False


SHAPES = [
    Shape("gqa2-tied"),
    Shape("mha-untied", num_key_value_heads=4, tie_word_embeddings=False),
    Shape("mqa-wide-heads", num_attention_heads=8, num_key_value_heads=1, head_dim=16, hidden_size=40),
    Shape(
        "llama3-rope",
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    Shape("linear-rope", rope_scaling={"rope_type": "linear", "factor": 4.0}, vocab_size=259),
]


def make_llama(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Writes config.json, model.safetensors and a byte-level tokenizer.json; weights wide enough for sharp logits."""
    torch.manual_seed(seed)
    options = {key: value for key, value in dataclasses.asdict(shape).items() if key != "name"}
    config = LlamaConfig(**options, bos_token_id=1, eos_token_id=2, initializer_range=0.15)
    model = LlamaForCausalLM(config).float()
    for name, parameter in model.named_parameters():  # these start at 0 and 1, where a mix-up would not show
        if name.endswith(".bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder, shape.vocab_size)
    return folder


def reference_logprobs(folder: Path, token_ids: list[int]) -> np.ndarray:
    """[len(token_ids), vocab]: row i is log-softmax of what follows token i, from transformers in float32."""
    return reference_of(load_reference(folder), token_ids)


def load_reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def reference_of(model: Any, token_ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level one, of so many words or of its 259."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *alphabet]
    words += [f"<filler-{index}>" for index in range(len(words), vocab_size)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
