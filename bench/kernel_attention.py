"""Cases of attention over paged KV: decodes, prompts, both in one launch, and the latent of MLA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.kernel_case import Case, Goal, Peer, Run, Setting, Work
from kernels import paged_attention, paged_attention_gpu
from kernels.kv_rows import quantise_rows

BLOCK_TOKENS = 16
WORKSPACE_BYTES = 128 << 20  # of FlashInfer, as its manual has it


@dataclasses.dataclass(frozen=True, slots=True)
class _Paged:
    """Sequences of `counts` queries each, at the ends of `lengths` tokens that lie in shuffled blocks."""

    setting: Setting
    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    tables: Tensor  # [S, M] int32
    starts: Tensor  # [S + 1] int32
    contexts: Tensor  # [S] int32

    @property
    def num_queries(self) -> int:
        return sum(self.counts)

    @property
    def num_blocks(self) -> int:
        return self.tables.numel()

    @property
    def num_splits(self) -> int | None:
        return 2 if self.setting.interpreted else None

    def pairs(self) -> int:
        """Of a query and a position that it sees."""
        each = zip(self.lengths, self.counts, strict=True)
        return sum(count * length - count * (count - 1) // 2 for length, count in each)


def _paged(setting: Setting, lengths: tuple[int, ...], counts: tuple[int, ...]) -> _Paged:
    width = -(-max(lengths) // BLOCK_TOKENS)
    tables = torch.randperm(len(lengths) * width, device=setting.device).int().view(len(lengths), width)
    starts = torch.tensor([sum(counts[:end]) for end in range(len(counts) + 1)], dtype=torch.int32)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=setting.device)
    return _Paged(setting, lengths, counts, tables, starts.to(setting.device), contexts)


def attention(
    setting: Setting,
    *,
    lengths: tuple[int, ...],
    counts: tuple[int, ...],
    heads: int,
    kv_heads: int,
    dim: int,
    kv_dtype: torch.dtype | None = None,
) -> Work:
    paged = _paged(setting, lengths, counts)
    queries = setting.drawn(paged.num_queries, heads, dim)
    blocks = setting.drawn(paged.num_blocks, 2, kv_heads, BLOCK_TOKENS, dim)
    stored = blocks if kv_dtype is None else quantise_rows(blocks, kv_dtype)
    arguments = (queries, stored[:, 0], stored[:, 1], paged.tables, paged.starts, paged.contexts, dim**-0.5)
    peers: dict[str, Peer] = {}
    if kv_dtype is None:
        peers = dict(_dense_peers(paged, queries, blocks)) if len({*zip(lengths, counts, strict=True)}) == 1 else {}
        peers["FlashInfer"] = Peer(lambda: _flashinfer(paged, queries, blocks))
    row_bytes = stored.shape[-1] * stored.element_size()
    return Work(
        lambda: paged_attention_gpu.launch(*arguments, num_splits=paged.num_splits),
        lambda: paged_attention.reference(*arguments),
        peers,
        2 * sum(lengths) * kv_heads * row_bytes + 2 * queries.nbytes,
        4.0 * heads * dim * paged.pairs(),
    )


def _dense_peers(paged: _Paged, queries: Tensor, blocks: Tensor) -> Mapping[str, Peer]:
    """With KV that lies together, as torch wants it: what it would cost to gather it is a gift to them."""
    length, count, num_sequences = paged.lengths[0], paged.counts[0], len(paged.lengths)
    is_causal, setting = count > 1, paged.setting
    assert count in (1, length), "torch puts the diagonal elsewhere"
    num_heads, dim = queries.shape[1:]
    q = queries.view(num_sequences, count, num_heads, dim).transpose(1, 2)

    def dense(plane: int) -> Tensor:
        rows = blocks[:, plane][paged.tables.long()].transpose(1, 2).flatten(2, 3)
        return rows[:, :, :length].contiguous()

    def by_rows(out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(paged.num_queries, num_heads * dim)

    def scaled_dot_product(backend: SDPBackend) -> Run:
        keys, values = dense(0), dense(1)

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return by_rows(F.scaled_dot_product_attention(q, keys, values, is_causal=is_causal, enable_gqa=True))

        return run

    def flex() -> Run:
        if setting.interpreted:
            raise NotImplementedError("it is nothing without torch.compile, which a dry run does without")
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        keys, values = dense(0), dense(1)
        mask = None
        if is_causal:
            mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device=str(setting.device))
        run = setting.compiled(flex_attention)
        return lambda: by_rows(run(q, keys, values, block_mask=mask, enable_gqa=True))

    return {
        "SDPA flash": Peer(lambda: scaled_dot_product(SDPBackend.FLASH_ATTENTION)),
        "SDPA cuDNN": Peer(lambda: scaled_dot_product(SDPBackend.CUDNN_ATTENTION)),
        "flex_attention": Peer(flex),
    }


def _flashinfer(paged: _Paged, queries: Tensor, blocks: Tensor) -> Run:
    """Over the same blocks: its layout "HND" is ours, [num_blocks, 2, Hkv, block_tokens, D]."""
    import flashinfer

    device, (heads, dim), kv_heads = queries.device, queries.shape[1:], blocks.shape[2]
    held = [-(-length // BLOCK_TOKENS) for length in paged.lengths]
    ends = torch.tensor([sum(held[:end]) for end in range(len(held) + 1)], dtype=torch.int32, device=device)
    used = torch.cat([table[:count] for table, count in zip(paged.tables, held, strict=True)])
    last = (paged.contexts - 1) % BLOCK_TOKENS + 1
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    dtypes = {"q_data_type": queries.dtype, "kv_data_type": blocks.dtype}
    if paged.num_queries == len(paged.lengths):
        decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        decode.plan(ends, used, last, heads, kv_heads, dim, BLOCK_TOKENS, **dtypes)
        return lambda: decode.run(queries, blocks).flatten(1)
    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    prefill.plan(paged.starts, ends, used, last, heads, kv_heads, dim, BLOCK_TOKENS, causal=True, **dtypes)
    return lambda: prefill.run(queries, blocks).flatten(1)


def latent(setting: Setting, *, lengths: tuple[int, ...], heads: int, dim: int, value_dim: int) -> Work:
    """Decodes over one row per token, which all heads share and whose first elements are the value (MLA)."""
    paged = _paged(setting, lengths, (1,) * len(lengths))
    queries = setting.drawn(len(lengths), heads, dim)
    blocks = setting.drawn(paged.num_blocks, 1, BLOCK_TOKENS, dim)
    arguments = (queries, blocks, blocks[..., :value_dim], paged.tables, paged.starts, paged.contexts, dim**-0.5)

    def products() -> Run:
        if len(set(lengths)) > 1:
            raise ValueError("torch takes sequences of one length")
        rows = blocks[paged.tables.long()].flatten(1, 3)[:, : lengths[0]].contiguous()

        def run() -> Tensor:
            weights = (torch.bmm(queries, rows.transpose(1, 2)).float() * dim**-0.5).softmax(-1)
            return torch.bmm(weights.to(rows.dtype), rows[..., :value_dim]).flatten(1)

        return run

    out_bytes = len(lengths) * heads * value_dim * queries.element_size()
    return Work(
        lambda: paged_attention_gpu.launch(*arguments, num_splits=paged.num_splits),
        lambda: paged_attention.reference(*arguments),
        {"bmm, softmax, bmm": Peer(products)},
        sum(lengths) * dim * blocks.element_size() + queries.nbytes + out_bytes,
        2.0 * heads * (dim + value_dim) * sum(lengths),
    )


SMALL = {"heads": 4, "kv_heads": 2, "dim": 16}
LLAMA = {"heads": 32, "kv_heads": 8, "dim": 128}
DRY_DECODES = {"lengths": (19, 19), "counts": (1, 1), **SMALL}
DECODES = {"lengths": (1023,) * 5, "counts": (1,) * 5, **LLAMA}
FULL_DECODES = {"lengths": (4096,) * 32, "counts": (1,) * 32, **LLAMA}
AS_SDPA = {"SDPA flash": 0.9, "SDPA cuDNN": 0.9}


def _prompt(num_tokens: int) -> Case:
    return Case(
        f"prefill attention, {num_tokens} causal",
        "paged_attention_gpu",
        attention,
        {"lengths": (9,), "counts": (9,), **SMALL},
        {"lengths": (777,), "counts": (777,), **LLAMA},
        {"lengths": (num_tokens,), "counts": (num_tokens,), **LLAMA},
        bound="product",
        goal=Goal("rate", 480e12),
        peer_goals=AS_SDPA,
    )


CASES = (
    Case(
        "decode attention, 32 x 4096",
        "paged_attention_gpu",
        attention,
        DRY_DECODES,
        DECODES,
        FULL_DECODES,
        goal=Goal("sheet", 0.75, 0.85),
        peer_goals={"FlashInfer": 0.95},
    ),
    Case(
        "decode attention, fp8 KV, 32 x 4096",
        "paged_attention_gpu",
        attention,
        DRY_DECODES | {"kv_dtype": torch.float8_e4m3fn},
        DECODES | {"kv_dtype": torch.float8_e4m3fn},
        FULL_DECODES | {"kv_dtype": torch.float8_e4m3fn},
    ),
    Case(
        "decode attention, latent, 32 x 4096",
        "paged_attention_gpu",
        latent,
        {"lengths": (19, 19), "heads": 4, "dim": 24, "value_dim": 16},
        {"lengths": (1023,) * 5, "heads": 128, "dim": 576, "value_dim": 512},
        {"lengths": (4096,) * 32, "heads": 128, "dim": 576, "value_dim": 512},
        bound="product",
    ),
    _prompt(4096),
    _prompt(8192),
    Case(
        "chunk of 512 at 8192, with 31 decodes at 4096",
        "paged_attention_gpu",
        attention,
        {"lengths": (17, 3), "counts": (3, 1), **SMALL},
        {"lengths": (777, 1023, 17), "counts": (100, 1, 1), **LLAMA},
        {"lengths": (8192,) + (4096,) * 31, "counts": (512,) + (1,) * 31, **LLAMA},
    ),
)
