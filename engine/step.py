"""The tokens of a step, as tensors."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from engine.projection import Segments


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StepTensors:
    """T tokens of S sequences one after the other, on the decoder's device."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, index in the sequence
    slots: Tensor  # [T] int64, block · block_tokens + offset, where the token's KV goes
    block_tables: Tensor  # [S, M] int32, padded on the right
    query_starts: Tensor  # [S + 1] int32, rising from 0 to T
    context_lens: Tensor  # [S] int32, tokens in the KV memory including this step's
    wanted_rows: Tensor | None  # [W] int64, rows whose hidden state is asked for; None: all of them, in order
    live: Tensor | None  # [T] int64, 1 or 0: the rows that are a sequence's; None: all, and none is padding
    adapters: Segments = ()  # rows of [0, T)
    wanted_adapters: Segments = ()  # rows of [0, W)
