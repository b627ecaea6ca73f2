"""A decoder, described by data. `engine/decoder.py` computes what this page says and knows no architecture by name.

`spec/hf_config.py` and `spec/gguf_config.py` read it from the files of a model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from spec.dtype import Dtype
from spec.errors import InvalidModel
from spec.layout import KVLayout

Activation = Literal["silu", "gelu_tanh", "swiglu_clamped"]


@dataclasses.dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), rotate-half form, over the first or last dimensions of a head.

    kind "default"; "linear": positions are divided by `factor`; "llama3": low frequencies are divided by `factor`, high
    ones kept, blended between; "yarn": the same by the number of turns within the original context, between `beta_fast`
    and `beta_slow` (Peng et al. 2023, arXiv:2309.00071); "longrope": each frequency has a divisor of its own
    (arXiv:2402.13753). `attention_factor` multiplies cos and sin. engine/rope.py holds the formulas.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: whether the two bounds are rounded to whole frequencies
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()  # longrope: one per frequency


@dataclasses.dataclass(frozen=True, slots=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads are linear in one
    latent row per token, which is all that is cached, beside one rotated key that all heads share."""

    query_rank: int | None  # None: queries come straight from the hidden state
    kv_rank: int
    plain_dim: int  # of a head's query and key, without position
    rope_dim: int
    value_dim: int


@dataclasses.dataclass(frozen=True, slots=True)
class MoeSpec:
    """Mixture of experts: which of them a token goes through, and with which weights (kernels/moe_route.py)."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    scoring: Literal["softmax", "softmax_chosen", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["max", "top2"] = "max"
    selection_bias: bool = False  # a bias that sways the choice and not the weight
    router_bias: bool = False
    expert_bias: bool = False
    shared_intermediate_size: int = 0  # of the experts that every token goes through; 0: none


@dataclasses.dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from one layer to the next."""

    window: int | None = None  # a token sees itself and the window - 1 before it; None: all
    rope: int = 0  # which of ModelSpec.ropes
    is_moe: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and options of one decoder-only transformer. With latent attention, num_kv_heads is 1 and head_dim that of
    a cached row, the latent and then the rotated key."""

    family: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # of the dense layers
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    rotary_dim: int
    attention_scale: float
    tie_embeddings: bool
    activation: Activation = "silu"
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    norm_offset: float = 0.0  # RMSNorm multiplies by offset + weight
    qk_norm: bool = False  # RMSNorm over each query and key head
    post_norms: bool = False  # RMSNorm after attention and MLP too, before they join the stream
    sinks: bool = False  # one learned logit per head in the softmax's denominator
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_scale: float = 1.0
    latent: LatentSpec | None = None
    moe: MoeSpec | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stored_dtype: Dtype = Dtype.BFLOAT16  # of the weights as they lie in the files; quantised ones count as bfloat16

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def kv_layout(self, block_tokens: int, dtype: Dtype) -> KVLayout:
        """Of one rank that holds the whole model."""
        planes = 1 if self.latent else 2
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, block_tokens, dtype, planes)

    @property
    def attention_parameters(self) -> int:
        """Of one layer, norms and biases left out."""
        if self.latent is None:
            return self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        latent = self.latent
        queries = self.num_heads * (latent.plain_dim + latent.rope_dim)
        down = self.hidden_size * (latent.kv_rank + latent.rope_dim + (latent.query_rank or queries))
        up = (latent.query_rank or 0) * queries + latent.kv_rank * self.num_heads * (
            latent.plain_dim + latent.value_dim
        )
        return down + up + self.num_heads * latent.value_dim * self.hidden_size

    def mlp_parameters(self, layer: int, *, active: bool = False) -> int:
        """Of one layer's feed-forward part; `active`: of those alone that a token goes through."""
        moe = self.moe
        if moe is None or not self.layers[layer].is_moe:
            return 3 * self.hidden_size * self.intermediate_size
        experts = moe.experts_per_token if active else moe.num_experts
        inner = experts * moe.intermediate_size + moe.shared_intermediate_size
        return self.hidden_size * (3 * inner + moe.num_experts)

    @property
    def num_parameters(self) -> int:
        """All weights but norms and biases; the embedding counts once where the head is tied to it."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        mlp = sum(self.mlp_parameters(layer) for layer in range(self.num_layers))
        return embeddings + self.num_layers * self.attention_parameters + mlp

    @property
    def num_read_parameters(self) -> int:
        """Weights read to decode one token alone: the head, and of the experts the chosen ones."""
        mlp = sum(self.mlp_parameters(layer, active=True) for layer in range(self.num_layers))
        return self.vocab_size * self.hidden_size + self.num_layers * self.attention_parameters + mlp

    def check(self) -> None:
        """Raises InvalidModel for sizes that do not fit together."""
        for field in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"):
            if getattr(self, field) < 1:
                raise InvalidModel(f"{field} must be at least 1, is {getattr(self, field)}")
        if self.vocab_size < 1 or self.max_context_tokens < 1:
            raise InvalidModel("vocab_size and the context must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InvalidModel(f"{self.num_heads} heads are not a multiple of {self.num_kv_heads} KV heads")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise InvalidModel(
                f"{self.rotary_dim} rotary dimensions of a head of {self.head_dim}: must be even and fit"
            )
        if not math.isfinite(self.attention_scale) or self.attention_scale <= 0:
            raise InvalidModel(f"attention_scale must be above 0, is {self.attention_scale}")
        if any(layer.window is not None and layer.window < 1 for layer in self.layers):
            raise InvalidModel("a sliding window must be at least 1")
        if self.moe is not None:
            self._check_moe(self.moe)

    def _check_moe(self, moe: MoeSpec) -> None:
        if min(moe.num_experts, moe.experts_per_token, moe.intermediate_size) < 1:
            raise InvalidModel("the number of experts, those per token and their size must be at least 1")
        if min(moe.num_groups, moe.groups_per_token) < 1:
            raise InvalidModel("groups of experts, and those per token, must be at least 1")
        if moe.num_experts % moe.num_groups:
            raise InvalidModel(f"{moe.num_experts} experts are no equal groups of {moe.num_groups}")
        choosable = moe.num_experts // moe.num_groups * moe.groups_per_token
        if moe.experts_per_token > choosable:
            raise InvalidModel(f"{moe.experts_per_token} experts per token, and only {choosable} can be chosen")
