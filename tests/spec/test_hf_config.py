"""What published files leave out, and what damaged ones hold."""

from __future__ import annotations

import pytest
import transformers
from transformers import DeepseekV3Config, Gemma2Config, Gemma3TextConfig, GptOssConfig, LlamaConfig, Qwen2Config

from spec.errors import InvalidModel, UnsupportedModel
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


@pytest.mark.parametrize("family", [[], {}, ["llama"], None, 1, "mamba"])
def test_a_family_that_is_none_is_refused(family: object) -> None:
    with pytest.raises(UnsupportedModel, match="model_type"):
        model_from_hf({**LlamaConfig().to_dict(), "model_type": family})


ODD_VALUES = [None, "abc", 0, -1, 1.5, [], {}, [1], ["x"], [None], True, 10**12, 10**400, 1e-300, float("inf")]
ODD_VALUES += [float("nan"), {"rope_type": "yarn"}]


@pytest.mark.parametrize(
    "family", [LlamaConfig, Gemma2Config, Gemma3TextConfig, Qwen2Config, DeepseekV3Config, GptOssConfig]
)
def test_no_value_of_any_key_is_more_than_a_refusal(family: type) -> None:
    config = family().to_dict()
    for key in sorted({*config, "text_config", "layer_types", "partial_rotary_factor", "rope_scaling", "n_group"}):
        for value in ODD_VALUES:
            try:
                model_from_hf({**config, key: value})
            except (InvalidModel, UnsupportedModel):
                pass
            except Exception as error:
                pytest.fail(f"{key} = {value!r}: {error!r}")


@pytest.mark.parametrize(
    ("family", "key", "value", "words"),
    [
        (LlamaConfig, "text_config", None, "text_config must be an object"),
        (LlamaConfig, "num_hidden_layers", 10**12, "num_hidden_layers must be at most"),
        (Gemma3TextConfig, "layer_types", ["sliding_attention"], "does not fit"),
        (Gemma3TextConfig, "query_pre_attn_scalar", -1, "does not fit"),
        (DeepseekV3Config, "n_group", 0, "groups of experts"),
        (LlamaConfig, "partial_rotary_factor", float("inf"), "does not fit"),
        *(
            (LlamaConfig, "eos_token_id", value, "eos_token_id must be")
            for value in (1.5, ["x"], [None], "a", True, -1)
        ),
    ],
)
def test_a_value_that_does_not_fit_is_named(family: type, key: str, value: object, words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        model_from_hf({**family().to_dict(), key: value})


def test_a_kind_of_layer_that_is_not_known_is_refused() -> None:
    config = Gemma2Config(num_hidden_layers=2).to_dict() | {"layer_types": ["full_attention", "chunked_attention"]}
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        model_from_hf(config)


def test_gemma_that_sees_what_comes_after_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="use_bidirectional_attention"):
        model_from_hf(Gemma3TextConfig().to_dict() | {"use_bidirectional_attention": True})


WINDOWS = {"use_sliding_window": True}
DEFAULTS_OF = [
    ("Llama", {}),
    ("Mistral", {}),
    ("Mixtral", {}),
    ("Qwen2", WINDOWS),
    ("Qwen3", WINDOWS),
    ("Qwen3Moe", WINDOWS),
    ("Gemma2", {}),
    ("Gemma3Text", {}),
    ("Phi3", {}),
    ("DeepseekV2", {"num_experts_per_tok": 6}),
    ("DeepseekV3", {}),
    ("GptOss", {}),
]


@pytest.mark.parametrize(("name", "options"), DEFAULTS_OF, ids=lambda value: value if isinstance(value, str) else "")
def test_a_key_that_is_left_out_is_as_transformers_has_it_or_asked_for(name: str, options: dict[str, object]) -> None:
    whole = getattr(transformers, f"{name}Config")(**options).to_dict()
    expected = model_from_hf(whole)
    checked = 0
    ropes = {"rope_parameters", "rope_scaling"}  # what published files always have where it is not plain
    for key in whole.keys() - options.keys() - ropes - {"model_type", "bos_token_id", "eos_token_id"}:
        left = {other: value for other, value in whole.items() if other not in (key, "layer_types")}
        try:
            found = model_from_hf(left)
        except InvalidModel:  # asked for
            continue
        assert found == expected, key
        checked += 1
    assert checked
