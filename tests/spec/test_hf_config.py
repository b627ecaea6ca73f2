"""What published files leave out."""

from __future__ import annotations

import pytest
from transformers import Gemma3TextConfig, LlamaConfig

from spec.errors import InvalidModel
from spec.hf_config import model_from_hf


@pytest.mark.parametrize("wrapped", [True, False])
def test_gemma_3_leaves_most_sizes_to_the_family(wrapped: bool) -> None:
    """The text part of the 4B model's file has these keys alone."""
    given = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    whole = model_from_hf(Gemma3TextConfig(**given).to_dict())
    text = {"model_type": "gemma3", "text_config": given} if wrapped else {"model_type": "gemma3_text", **given}
    found = model_from_hf(text)
    for field in ("num_heads", "num_kv_heads", "head_dim", "vocab_size", "max_context_tokens", "rms_norm_eps"):
        assert getattr(found, field) == getattr(whole, field), field
    assert found.layers == whole.layers
    assert found.ropes == whole.ropes
    assert found.attention_scale == whole.attention_scale
    assert found.tie_embeddings == whole.tie_embeddings


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_key_value_heads", "vocab_size", "head_dim"])
@pytest.mark.parametrize("value", [16.5, "16", True, [16], float("inf")])
def test_a_number_that_is_not_whole_is_named(key: str, value: object) -> None:
    with pytest.raises(InvalidModel, match=f"{key} must be a whole number"):
        model_from_hf({**LlamaConfig().to_dict(), key: value})


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert model_from_hf({**LlamaConfig().to_dict(), "hidden_size": 4096.0}).hidden_size == 4096
