"""Opens a model's files, lazily."""

from __future__ import annotations

from pathlib import Path

from engine.gguf_file import GgufFile
from engine.hf_folder import HuggingFaceFolder
from engine.model_base import ModelFiles
from spec.errors import InvalidModel


def open_model(path: str | Path) -> ModelFiles:
    """A Hugging Face folder (config.json and safetensors, sharded or not) or a .gguf file.

    Raises InvalidModel: no such path, no model folder, a file missing, unreadable or cut short, a tensor missing or of
    the wrong shape. Raises UnsupportedModel: a family, option or tensor type that no table row knows.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InvalidModel(f"{path} does not exist", file=path)
    if path.is_file() and path.suffix != ".gguf":
        raise InvalidModel(f"{path} is neither a folder nor a .gguf file", file=path)
    files: ModelFiles = HuggingFaceFolder(path) if path.is_dir() else GgufFile(path)
    files.check()
    return files
