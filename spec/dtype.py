"""Element types of weights, activations and KV, by their Hugging Face names."""

from __future__ import annotations

import enum

from spec.errors import InvalidConfiguration


class Dtype(enum.Enum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def itemsize_bytes(self) -> int:
        return 4 if self is Dtype.FLOAT32 else 2

    @classmethod
    def parse(cls, name: str) -> Dtype:
        """Raises InvalidConfiguration and names the known ones."""
        try:
            return cls(name)
        except ValueError:
            known = ", ".join(dtype.value for dtype in cls)
            raise InvalidConfiguration(f"unknown dtype {name!r}; known are {known}") from None
