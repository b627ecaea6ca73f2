"""A decoder, described by data. `engine/decoder.py` computes what this page says and knows no architecture by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from spec.dtype import Dtype
from spec.errors import InvalidModel, UnsupportedModel
from spec.layout import KVLayout


@dataclasses.dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021) over the whole head, rotate-half form.

    kind "default"; "linear": positions are divided by `factor`; "llama3": low frequencies are divided by `factor`, high
    ones kept, blended between (Llama 3.1, as in transformers `_compute_llama3_parameters`).
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes and options of one decoder-only transformer."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_embeddings: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    stored_dtype: Dtype = Dtype.BFLOAT16  # of the weights as they lie in the files; quantized ones count as bfloat16

    def kv_layout(self, block_tokens: int, dtype: Dtype) -> KVLayout:
        return KVLayout(self.num_layers, self.num_kv_heads, self.head_dim, block_tokens, dtype)

    @property
    def num_parameters(self) -> int:
        """Weights read for one token (the embedding counts once, as the head)."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp) + self.vocab_size * self.hidden_size

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelSpec:
        """From a Hugging Face `config.json`. Raises UnsupportedModel for a family or option no row knows, InvalidModel
        for a key that is missing or does not fit."""
        family = config.get("model_type")
        if family not in HF_FAMILIES:
            known = ", ".join(sorted(HF_FAMILIES))
            raise UnsupportedModel(f"model_type {family!r} is not known; known are {known}", family=family)
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"hidden_act {config['hidden_act']!r} is not known to family {family}, only silu")
        try:
            hidden_size = int(config["hidden_size"])
            num_heads = int(config["num_attention_heads"])
            spec = cls(
                family=str(family),
                num_layers=int(config["num_hidden_layers"]),
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_dim=int(config.get("head_dim") or hidden_size // num_heads),
                intermediate_size=int(config["intermediate_size"]),
                vocab_size=int(config["vocab_size"]),
                max_context_tokens=int(config["max_position_embeddings"]),
                rms_norm_eps=float(config["rms_norm_eps"]),
                rope=_rope_from_hf(config),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
                bos_token_id=config.get("bos_token_id"),
                eos_token_ids=_as_ids(config.get("eos_token_id")),
            )
        except KeyError as missing:
            raise InvalidModel(f"config.json has no {missing.args[0]!r}") from None
        except (TypeError, ValueError) as error:
            raise InvalidModel(f"config.json holds a value that does not fit: {error}") from None
        spec._check()
        return spec

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], tensor_names: Collection[str]) -> ModelSpec:
        """From the metadata of a GGUF file and the names of its tensors, which tell tied embeddings and biases.

        Raises UnsupportedModel for an architecture or option no row knows, InvalidModel for a key that is missing or
        does not fit. Scaling that GGUF keeps in a tensor (`rope_freqs.weight`) is not seen here."""
        family = metadata.get("general.architecture")
        if family not in GGUF_ARCHITECTURES:
            known = ", ".join(sorted(GGUF_ARCHITECTURES))
            raise UnsupportedModel(f"GGUF architecture {family!r} is not known; known are {known}", family=family)

        def key(name: str, default: Any = None) -> Any:
            value = metadata.get(f"{family}.{name}", default)
            if value is None:
                raise InvalidModel(f"the GGUF metadata has no '{family}.{name}'")
            return value

        if int(key("expert_count", 0)):
            raise UnsupportedModel("this GGUF is a mixture of experts, which no row knows", family=family)
        try:
            hidden_size, num_heads = int(key("embedding_length")), int(key("attention.head_count"))
            head_dim = int(key("attention.key_length", hidden_size // num_heads))
            for name in ("attention.value_length", "rope.dimension_count"):
                if int(key(name, head_dim)) != head_dim:
                    raise UnsupportedModel(f"{family}.{name} is {key(name)}; only the head's own {head_dim} is known")
            eos_ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
            spec = cls(
                family=GGUF_ARCHITECTURES[family],
                num_layers=int(key("block_count")),
                hidden_size=hidden_size,
                num_heads=num_heads,
                num_kv_heads=int(key("attention.head_count_kv", num_heads)),
                head_dim=head_dim,
                intermediate_size=int(key("feed_forward_length")),
                vocab_size=int(key("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))),
                max_context_tokens=int(key("context_length")),
                rms_norm_eps=float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5 was rounded to fp32
                rope=_rope_from_gguf(key),
                tie_embeddings="output.weight" not in tensor_names,
                attention_bias="blk.0.attn_q.bias" in tensor_names,
                mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
                bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
                eos_token_ids=tuple(dict.fromkeys(int(token_id) for token_id in eos_ids if token_id is not None)),
            )
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise InvalidModel(f"the GGUF metadata holds a value that does not fit: {error}") from None
        spec._check()
        return spec

    def _check(self) -> None:
        for field in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
        ):
            if getattr(self, field) < 1:
                raise InvalidModel(f"{field} must be at least 1, is {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise InvalidModel(f"{self.num_heads} heads are not a multiple of {self.num_kv_heads} KV heads")
        if self.head_dim % 2:
            raise InvalidModel(f"head_dim must be even for rotary embedding, is {self.head_dim}")


HF_FAMILIES = frozenset({"llama"})
GGUF_ARCHITECTURES = {"llama": "llama"}  # general.architecture -> family


def _rope_from_hf(config: Mapping[str, Any]) -> RopeSpec:
    parameters = config.get("rope_parameters") or {}  # transformers 5 writes theta and scaling here
    theta = float(config.get("rope_theta") or parameters.get("rope_theta") or 10000.0)
    scaling = config.get("rope_scaling") or parameters
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=float(scaling["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta=theta,
            kind="llama3",
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_positions=int(scaling["original_max_position_embeddings"]),
        )
    raise UnsupportedModel(f"rope_scaling type {kind!r} is not known; default, linear, llama3 are", rope_type=kind)


def _rope_from_gguf(key: Callable[..., Any]) -> RopeSpec:
    theta = float(key("rope.freq_base", 10000.0))
    kind = key("rope.scaling.type", "none")
    factor = float(key("rope.scaling.factor", key("rope.scale_linear", 1.0)))
    if kind == "none":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    raise UnsupportedModel(f"GGUF rope scaling {kind!r} is not known; known are none, linear", rope_type=kind)


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)
