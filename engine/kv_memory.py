"""The paged KV cache of one rank: one tensor, in memory of its own or in memory that a transport registered."""

from __future__ import annotations

import torch
from torch import Tensor

from spec.dtype import Dtype
from spec.errors import InvalidConfiguration, OutOfBlocks
from spec.layout import KVLayout

TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
    Dtype.FLOAT8_E4M3: torch.float8_e4m3fn,
    Dtype.INT8: torch.int8,
}


class KVMemory:
    """`tensor` is [num_blocks, num_layers, planes, num_kv_heads, block_tokens, row]; see KVLayout.

    `value_dim`: where there is one plane (multi-head latent attention), so many elements of its rows are the values.

    A given buffer stays its owner's; it must outlive this object and be at least num_blocks · layout.block_bytes long.
    Blocks are not cleared: whoever takes one writes a position before reading it. `spare_blocks` more lie behind the
    `num_blocks` that sequences own, [num_blocks, num_blocks + spare_blocks) of `tensor`; memory that is given has none.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: torch.device,
        buffer: memoryview | None = None,
        value_dim: int | None = None,
        spare_blocks: int = 0,
    ) -> None:
        if num_blocks < 1:
            raise InvalidConfiguration(f"KV memory needs at least 1 block, was given {num_blocks}")
        dtype, shape = TORCH_DTYPES[layout.dtype], layout.shape(num_blocks + spare_blocks)
        self.layout, self.num_blocks, self.spare_blocks = layout, num_blocks, spare_blocks
        if buffer is None:
            self.tensor = _allocated(shape, dtype, device, (num_blocks + spare_blocks) * layout.block_bytes)
        else:
            assert spare_blocks == 0
            self.tensor = _over(buffer, num_blocks * layout.block_bytes, dtype, device).view(shape)
        self._layers = [(self.tensor[:, i, 0], self._values(i, value_dim)) for i in range(layout.num_layers)]

    def _values(self, index: int, value_dim: int | None) -> Tensor:
        if self.layout.planes == 2:
            return self.tensor[:, index, 1]
        return self.tensor[:, index, 0, :, :, :value_dim]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(key_blocks, value_blocks), strided views [num_blocks, num_kv_heads, block_tokens, row]; see KVLayout."""
        return self._layers[index]


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, num_bytes: int) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # torch raises it for the CPU, and its OutOfMemoryError is one
        raise OutOfBlocks(f"cannot allocate {num_bytes} bytes of KV memory on {device}: {error}") from None


def _over(buffer: memoryview, num_bytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        raise InvalidConfiguration(f"KV memory in a host buffer is for the cpu, the engine runs on {device}")
    if buffer.readonly or not buffer.c_contiguous or buffer.nbytes < num_bytes:
        raise InvalidConfiguration(
            f"KV memory needs a writable, contiguous buffer of {num_bytes} bytes, was given {buffer.nbytes}"
        )
    return torch.frombuffer(buffer.cast("B")[:num_bytes], dtype=dtype)
