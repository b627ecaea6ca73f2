"""What bench.gpu measures with: shapes of known models, weights drawn on the device, and the work of their steps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.engine import Engine, EngineOptions
from engine.families import tensor_shapes
from engine.model_base import ModelFiles
from spec.hf_config import model_from_hf
from spec.model import ModelSpec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}
LLAMA_1B = LLAMA | {
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "head_dim": 64,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
}


QWEN3_MOE = {  # a quarter of Qwen3-30B-A3B's layers and experts
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 12,
    "tie_word_embeddings": False,
}
SMALL = {
    "vocab_size": 131,
    "max_position_embeddings": 256,
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 6,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Sizes:
    """Of one run: the models, and how much of everything."""

    small: dict[str, Any] = dataclasses.field(default_factory=lambda: LLAMA_1B)
    large: dict[str, Any] = dataclasses.field(default_factory=lambda: LLAMA_8B)
    experts: dict[str, Any] = dataclasses.field(default_factory=lambda: QWEN3_MOE)
    copy_bytes: int = 4 << 30
    product_size: int = 8192
    context_tokens: int = 1024
    prefill_tokens: int = 8192
    batches: tuple[int, ...] = (64, 128, 256)


DRY = Sizes(
    small=LLAMA_1B | SMALL,
    large=LLAMA_8B | SMALL,
    experts=QWEN3_MOE | SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    copy_bytes=1 << 20,
    product_size=32,
    context_tokens=20,
    prefill_tokens=40,
    batches=(2, 3),
)


class DrawnWeights(ModelFiles):
    """Normally distributed weights that keep activations finite, norms of one; made when asked for, on `device`."""

    def __init__(self, spec: ModelSpec, device: torch.device, seed: int = 0) -> None:
        self.path, self.spec = Path("drawn"), spec
        self._shapes, self._device = tensor_shapes(spec), device
        self._generator = torch.Generator(device).manual_seed(seed)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def file_of(self, name: str) -> Path:
        return self.path

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        shape, dtype = self._shapes[name], dtype or torch.bfloat16
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=self._device)
        scale = shape[-1] ** -0.5
        return torch.empty(shape, dtype=dtype, device=self._device).normal_(0, scale, generator=self._generator)

    @property
    def revision(self) -> str:  # type: ignore[override]
        return "0" * 32


def make_engine(config: dict[str, Any], device: torch.device, num_blocks: int, graph_rows: int) -> Engine:
    options = EngineOptions(dtype="bfloat16", device=device.type, graph_rows=graph_rows)
    engine = Engine(DrawnWeights(model_from_hf(config), device), options, num_blocks)
    engine.kv.tensor.normal_()
    engine.warm_up()
    return engine


def weight_bytes_read(spec: ModelSpec) -> int:
    """By a decode step at batch 1, in bfloat16: of experts the chosen ones."""
    return 2 * spec.num_read_parameters


def prefill_flop(spec: ModelSpec, num_tokens: int) -> float:
    """Of a prompt whose last token alone goes through the head."""
    head = spec.vocab_size * spec.hidden_size
    in_layers = spec.num_read_parameters - head
    attention = 2 * spec.num_layers * spec.num_heads * spec.head_dim * num_tokens**2
    return 2.0 * (in_layers * num_tokens + head) + attention
