"""What a model's files are to the engine, whatever their format: tensors in Hugging Face naming, one at a time.

The revision is a digest that two workers compare before they exchange KV: equal files have equal revisions wherever
they lie. It covers the configuration, every tensor header, every file's size, and of each file's tensor data its first
and last 4 KiB and 256 windows of 4 KiB evenly spread between. A fine-tune or another quantization changes nearly every
weight, so it changes some window; an edit of a few single weights may not. 100 GB take a fraction of a second.
"""

from __future__ import annotations

import abc
import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path

import torch

from engine.families import tensor_shapes
from kernels.quantised import QuantisedWeight
from spec.errors import InvalidModel
from spec.model import ModelSpec

WINDOW_BYTES = 4096
NUM_WINDOWS = 256


class ModelFiles(abc.ABC):
    """Where a model's weights lie, and what they are. Opening checks the presence and shape of every tensor."""

    path: Path
    spec: ModelSpec

    @property
    @abc.abstractmethod
    def names(self) -> frozenset[str]:
        """Tensors in the files, in Hugging Face naming; may hold more than the model needs."""

    @abc.abstractmethod
    def shape(self, name: str) -> tuple[int, ...]: ...

    @abc.abstractmethod
    def file_of(self, name: str) -> Path:
        """The file that holds the tensor, for messages."""

    @abc.abstractmethod
    def tensor(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor on the CPU, in `dtype` or as stored (quantised ones then come as float32). Nothing is kept of it.

        Raises InvalidModel when the file no longer holds what its head promised.
        """

    def quantised(self, name: str, expert: int | None = None) -> QuantisedWeight | None:
        """The same matrix as it is stored, where it is stored quantised, in Hugging Face order of rows; with `expert`
        that one of a stacked tensor, [out, in]. None: only `tensor` has it."""
        return None

    def order(self, name: str) -> torch.Tensor | None:
        """Where `quantised` gives the matrix with its inputs in another order than the file's: those of one scale
        together, [in] int64."""
        return None

    @cached_property
    @abc.abstractmethod
    def revision(self) -> str:
        """32 hex digits; see the top of this file."""

    def check(self) -> None:
        """Raises InvalidModel naming file, tensor, expected and found shape of the first tensor that does not fit."""
        names = self.names
        for name, expected in tensor_shapes(self.spec).items():
            shape = "×".join(map(str, expected))
            if name not in names:
                raise InvalidModel(f"{self.path} lacks tensor {name}, expected of shape {shape}", tensor=name)
            if self.shape(name) != expected:
                found, file = "×".join(map(str, self.shape(name))), self.file_of(name)
                raise InvalidModel(
                    f"tensor {name} in {file} has shape {found}, expected {shape}",
                    file=file,
                    tensor=name,
                    expected=shape,
                    found=found,
                )


def update_with_sample(digest: hashlib.blake2b, path: Path, header_bytes: int) -> None:
    """The file's size, its first `header_bytes` whole, and a sample of the rest (see the top of this file)."""
    size = path.stat().st_size
    digest.update(struct.pack("<QQ", size, header_bytes))
    with path.open("rb") as file:
        digest.update(file.read(header_bytes))
        span = max(size - header_bytes - WINDOW_BYTES, 0)
        for window in range(NUM_WINDOWS + 2):
            digest.update(os.pread(file.fileno(), WINDOW_BYTES, header_bytes + span * window // (NUM_WINDOWS + 1)))
