"""RopeSpec from a Hugging Face `config.json`, as transformers 4 and 5 write it."""

from __future__ import annotations

import math

from spec.errors import UnsupportedModel
from spec.hf_values import Config, whole
from spec.model import RopeSpec

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "longrope")


def rope_parameters(config: Config) -> Config:
    """Theta and scaling in one; transformers 5 writes them so, 4 as two keys."""
    parameters = config.get("rope_parameters") or {}
    return {"rope_theta": config.get("rope_theta") or 10000.0, **parameters, **(config.get("rope_scaling") or {})}


def rope_kind(parameters: Config) -> str:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    if kind not in ROPE_KINDS:
        known = ", ".join(ROPE_KINDS)
        raise UnsupportedModel(f"rope_scaling type {kind!r} is not known; known are {known}", rope_type=kind)
    return kind


def partial_rotary(config: Config) -> float:
    partial = config.get("partial_rotary_factor") or (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return 1.0 if partial is None else float(partial)


def rope_of(config: Config, parameters: Config) -> RopeSpec:
    """Raises UnsupportedModel for scaling of an unknown kind, and what a key that is missing or does not fit raises."""
    theta, kind = float(parameters.get("rope_theta") or 10000.0), rope_kind(parameters)
    if kind == "linear":
        return RopeSpec(theta, "linear", float(parameters["factor"]))
    if kind == "llama3":
        return RopeSpec(
            theta,
            "llama3",
            float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=whole(parameters, "original_max_position_embeddings"),
        )
    if kind == "yarn":
        return _yarn(theta, parameters)
    if kind == "longrope":
        return _longrope(theta, config, parameters)
    return RopeSpec(theta)


def _yarn(theta: float, parameters: Config) -> RopeSpec:
    factor, attention_factor = float(parameters["factor"]), parameters.get("attention_factor")
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if attention_factor is None:
        attention_factor = yarn_magnitude(factor, 1.0)
        if mscale and all_dim:
            attention_factor = yarn_magnitude(factor, float(mscale)) / yarn_magnitude(factor, float(all_dim))
    return RopeSpec(
        theta,
        "yarn",
        factor,
        original_max_positions=whole(parameters, "original_max_position_embeddings"),
        beta_fast=float(parameters.get("beta_fast") or 32.0),
        beta_slow=float(parameters.get("beta_slow") or 1.0),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(attention_factor),
    )


def yarn_magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(theta: float, config: Config, parameters: Config) -> RopeSpec:
    """One set of divisors for the whole model: the long ones where its context is longer than the original.

    transformers takes the short ones for sequences that are still short, and so changes the positions of keys that are
    cached already; KV that is shared, chunked and handed over has to be a function of the tokens alone."""
    key, longest = "original_max_position_embeddings", whole(config, "max_position_embeddings")
    original = whole(parameters, key, 0) or whole(config, key, longest)
    factor = float(parameters.get("factor") or longest / original)
    attention_factor = parameters.get("attention_factor")
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1.0 else math.sqrt(1.0 + math.log(factor) / math.log(original))
    divisors = parameters["long_factor" if longest > original else "short_factor"]
    return RopeSpec(
        theta,
        "longrope",
        factor,
        original_max_positions=original,
        attention_factor=float(attention_factor),
        divisors=tuple(float(divisor) for divisor in divisors),
    )
