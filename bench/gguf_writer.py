"""A GGUF file with the weights of a Hugging Face folder, for llama.cpp to run beside us on the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter, quants
from gguf.constants import MODEL_ARCH, GGMLQuantizationType, GGUFValueType, LlamaFileType
from gguf.tensor_mapping import get_tensor_name_map

from engine.model_files import open_model

FILE_TYPES = {
    "BF16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
_WRITER_ADDS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def write_gguf(folder: Path, original: Path, target: Path, kind: str) -> None:
    """Matrices of the Llama in `folder` as `kind` ("BF16" or "Q8_0"), vectors as float32; everything that is no tensor
    (hyperparameters, tokenizer) as it is in the GGUF file `original`."""
    files, (matrix_type, file_type) = open_model(folder), FILE_TYPES[kind]
    heads = {"q_proj": files.spec.num_heads, "k_proj": files.spec.num_kv_heads}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, files.spec.num_layers)
    writer = GGUFWriter(target, "llama")
    _copy_metadata(GGUFReader(original), writer)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for name in sorted(files.names):
        values = files.tensor(name, torch.float32).numpy()
        for projection, num_heads in heads.items():
            if f".{projection}." in name:
                values = pair_rows(values, num_heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        tensor_type = matrix_type if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name, quants.quantize(values, tensor_type), raw_dtype=tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """[num_heads * head_dim, ...] -> the same rows in GGUF's order, which rotates dimensions (2i, 2i+1) of a head
    together where Hugging Face rotates (i, i + head_dim/2)."""
    return values.reshape(num_heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _copy_metadata(source: GGUFReader, target: GGUFWriter) -> None:
    for key, field in source.fields.items():
        if not key.startswith(_WRITER_ADDS):
            element_type = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            target.add_key_value(key, field.contents(), field.types[0], element_type)
