"""From a GGUF file to a Hugging Face folder that transformers, and this engine, load."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.families import tensor_shapes
from engine.gguf_file import GgufFile
from engine.kv_memory import TORCH_DTYPES
from engine.model_files import open_model
from spec.dtype import Dtype
from spec.errors import InvalidConfiguration, InvalidModel
from spec.model import ModelSpec, RopeSpec

SHARD_BYTES = 2 << 30  # of tensors in memory at once


def convert_gguf(
    gguf_path: str | Path,
    target_dir: str | Path,
    progress: Callable[[float], None] | None = None,
    *,
    write_tokenizer: Callable[[Path], None] | None = None,
    dtype: Dtype = Dtype.BFLOAT16,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json, weights in `dtype`, and what `write_tokenizer(folder)` writes.

    The folder appears whole or not at all: it is written under another name beside `target_dir` and renamed. Raises
    InvalidConfiguration when the target exists and is not an empty folder or cannot be written, and what `open_model`
    raises.
    """
    target = Path(target_dir).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InvalidConfiguration(f"{target} exists and is not an empty folder", path=target)
    files = open_model(gguf_path)
    if not isinstance(files, GgufFile):
        raise InvalidModel(f"{gguf_path} is no .gguf file", file=gguf_path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            partial.chmod(0o755)
            _write_json(partial / "config.json", hf_config(files.spec, dtype))
            _write_json(partial / "generation_config.json", _generation_config(files.spec))
            _write_weights(files, partial, dtype, shard_bytes, progress)
            if write_tokenizer is not None:
                write_tokenizer(partial)
            partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise InvalidConfiguration(f"{target} cannot be written: {error}", path=target) from None


def hf_config(spec: ModelSpec, dtype: Dtype) -> dict[str, Any]:
    """What `spec.hf_config.model_from_hf` reads back, as the config.json that every version of transformers takes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": spec.family,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_context_tokens,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": spec.ropes[0].theta,
        "rope_scaling": _rope_scaling(spec.ropes[0]),
        "tie_word_embeddings": spec.tie_embeddings,
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": _eos(spec),
        "torch_dtype": dtype.value,
    }


def _rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    if rope.kind == "default":
        return None
    scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return scaling


def _generation_config(spec: ModelSpec) -> dict[str, Any]:
    return {"bos_token_id": spec.bos_token_id, "eos_token_id": _eos(spec)}


def _eos(spec: ModelSpec) -> int | list[int] | None:
    ids = list(spec.eos_token_ids)
    return ids[0] if len(ids) == 1 else ids or None


def _write_weights(
    files: GgufFile, folder: Path, dtype: Dtype, shard_bytes: int, progress: Callable[[float], None] | None
) -> None:
    """One model.safetensors, or an index and shards of at most `shard_bytes`; a larger tensor is a shard of its own."""
    sizes = {name: math.prod(shape) * dtype.itemsize_bytes for name, shape in tensor_shapes(files.spec).items()}
    shards = _shards(sizes, shard_bytes)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    done = 0
    for file, shard in zip(names, shards, strict=True):
        tensors: dict[str, torch.Tensor] = {}
        for name in shard:
            tensors[name] = files.tensor(name, TORCH_DTYPES[dtype]).contiguous()
            done += 1
            if progress is not None:
                progress(done / len(sizes))
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # the library makes files that only their owner reads


def _shards(sizes: dict[str, int], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
