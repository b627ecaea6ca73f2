"""ModelSpec from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from spec.errors import InvalidModel, UnsupportedModel
from spec.model import LayerSpec, ModelSpec, RopeSpec

GGUF_ARCHITECTURES = {"llama": "llama"}  # general.architecture -> family


def model_from_gguf(metadata: Mapping[str, Any], tensor_names: Collection[str]) -> ModelSpec:
    """From the metadata and the names of the tensors, which tell tied embeddings and biases.

    Raises UnsupportedModel for an architecture or option no row knows, InvalidModel for a key that is missing or does
    not fit. Scaling that GGUF keeps in a tensor (`rope_freqs.weight`) is not seen here."""
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
        has_bias = "blk.0.attn_q.bias" in tensor_names
        spec = ModelSpec(
            family=GGUF_ARCHITECTURES[family],
            hidden_size=hidden_size,
            num_heads=num_heads,
            num_kv_heads=int(key("attention.head_count_kv", num_heads)),
            head_dim=head_dim,
            intermediate_size=int(key("feed_forward_length")),
            vocab_size=int(key("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())))),
            max_context_tokens=int(key("context_length")),
            rms_norm_eps=float(f"{key('attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5 was rounded to fp32
            layers=(LayerSpec(),) * int(key("block_count")),
            ropes=(_rope(key),),
            rotary_dim=head_dim,
            attention_scale=head_dim**-0.5,
            tie_embeddings="output.weight" not in tensor_names,
            qkv_bias=has_bias,
            output_bias=has_bias,
            mlp_bias="blk.0.ffn_gate.bias" in tensor_names,
            bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(int(token_id) for token_id in eos_ids if token_id is not None)),
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidModel(f"the GGUF metadata holds a value that does not fit: {error}") from None
    spec.check()
    return spec


def _rope(key: Callable[..., Any]) -> RopeSpec:
    theta = float(key("rope.freq_base", 10000.0))
    kind = key("rope.scaling.type", "none")
    factor = float(key("rope.scaling.factor", key("rope.scale_linear", 1.0)))
    if kind == "none":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, kind="linear", factor=factor)
    raise UnsupportedModel(f"GGUF rope scaling {kind!r} is not known; known are none, linear", rope_type=kind)
