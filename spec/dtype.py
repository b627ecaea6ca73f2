"""Element types of weights, activations and KV, by their Hugging Face names."""

from __future__ import annotations

import enum

from spec.errors import InvalidConfiguration


class Dtype(enum.Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT8_E4M3 = "float8_e4m3"  # of KV alone: one scale a row
    INT8 = "int8"  # of KV alone: one scale a row

    @property
    def itemsize_bytes(self) -> int:
        return 4 if self is Dtype.FLOAT32 else 1 if self.is_quantised else 2

    @property
    def is_quantised(self) -> bool:
        return self is Dtype.INT8 or self is Dtype.FLOAT8_E4M3

    @classmethod
    def parse(cls, name: str) -> Dtype:
        """Raises InvalidConfiguration and names the known ones."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(dtype.value for dtype in cls)
            raise InvalidConfiguration(f"unknown dtype {name!r}; known are {known}") from None
