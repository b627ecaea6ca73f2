"""The head of a GGUF file: metadata and the table of tensors, without their data.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Read here and
not by the `gguf` library, because that one takes seconds over a vocabulary, in every process of a cluster.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spec.errors import InvalidModel

MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class GgufTensor:
    """`shape` as torch has it (rows first; GGUF writes the reverse). `offset` counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data_offset: int  # end of the head, start of the tensor data


def read_header(path: Path) -> GgufHeader:
    """Raises InvalidModel when the file is no GGUF, of an unknown version, or ends inside its head."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).header()
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise InvalidModel(f"{path} cannot be read: {error}", file=path) from None


class _Cursor:
    """Reads forward through the bytes; every read is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def header(self) -> GgufHeader:
        if self.bytes(4) != MAGIC:
            raise self.fault("is no GGUF file: it does not begin with 'GGUF'")
        version = self.number("I")
        if version not in (2, 3):
            raise self.fault(f"is GGUF version {version}; known are 2 and 3, little-endian")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            metadata[key] = self.value(self.number("I"))
        raw = [self.tensor_entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.fault(f"has a general.alignment of {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {name: GgufTensor(name, shape, type_id, start + offset) for name, shape, type_id, offset in raw}
        return GgufHeader(metadata, tensors, start)

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dimensions = self.string(), self.number("I")
        if num_dimensions > _MAX_DIMENSIONS:
            raise self.fault(f"gives tensor {name} {num_dimensions} dimensions; at most {_MAX_DIMENSIONS} are known")
        shape = tuple(reversed([self.number("Q") for _ in range(num_dimensions)]))
        return name, shape, self.number("I"), self.number("Q")

    def value(self, type_id: int) -> Any:
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALARS:
                layout = f"<{count}{_SCALARS[element]}"
                return list(struct.unpack(layout, self.bytes(struct.calcsize(f"<{_SCALARS[element]}") * count)))
            return [self.value(element) for _ in range(count)]
        if type_id not in _SCALARS:
            raise self.fault(f"holds a metadata value of unknown type {type_id}")
        return self.number(_SCALARS[type_id])

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self.bytes(size))[0]

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8", errors="replace")

    def bytes(self, count: int) -> bytes:
        end = self.at + count
        if end > len(self.data):
            raise self.fault(f"is cut short: its head needs byte {end}, the file has {len(self.data)}")
        piece = self.data[self.at : end]
        self.at = end
        return piece

    def fault(self, what: str) -> InvalidModel:
        return InvalidModel(f"{self.path} {what}", file=self.path)
