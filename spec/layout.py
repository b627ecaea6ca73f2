"""How a worker is laid out over ranks, and how the KV memory of a rank lies."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Literal

from spec.dtype import Dtype
from spec.errors import InvalidConfiguration


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """The KV memory of one rank: [num_blocks, num_layers, planes, num_kv_heads, block_tokens, row].

    Planes are key and value, or the one latent row of multi-head latent attention. Block-major, so that a block of all
    layers is one contiguous piece of memory, and goes to a peer of the same layout as one write. A head's tokens within
    a block are contiguous too: the unit that survives a change of tp and pp. A row is head_dim elements; in a quantised
    dtype a float32, the row's scale, follows them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: Dtype
    planes: int = 2

    @property
    def row_elements(self) -> int:
        return self.head_dim + (SCALE_BYTES if self.dtype.is_quantised else 0)

    @property
    def row_bytes(self) -> int:
        """One head of one token in one plane."""
        return self.row_elements * self.dtype.itemsize_bytes

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.planes * self.num_kv_heads * self.row_bytes

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    @property
    def run_bytes(self) -> int:
        """One head's tokens in one block, layer and plane."""
        return self.block_tokens * self.row_bytes

    @property
    def layout_id(self) -> str:
        planes = "" if self.planes == 2 else f"/p{self.planes}"
        return (
            f"blocks/l{self.num_layers}{planes}/h{self.num_kv_heads}/d{self.head_dim}/t{self.block_tokens}"
            f"/{self.dtype.value}"
        )

    def shape(self, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        return (num_blocks, self.num_layers, self.planes, self.num_kv_heads, self.block_tokens, self.row_elements)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)


SCALE_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class ParallelLayout:
    """A worker of tp · pp · dp ranks. Rank (stage, group, index) is number (stage · dp + group) · tp + index.

    tp  tensor parallel: heads, MLP and vocabulary are cut among the ranks of a group
    pp  pipeline stages, each a run of layers
    dp  groups of a stage that hold the attention's weights each, and KV of sequences of their own
    ep  parts into which the tp · dp ranks of a stage are cut, each with experts of its own; the ranks of a part share
        each of its experts, cut along the intermediate size

    `mlp` "gathered": a rank of a group brings the whole MLP weights of a layer together for a share of the tokens, in
    place of all tokens with a share of the weights (weight-gathered, Pope et al. 2022, arXiv:2211.05102, section 3.2);
    only in steps of at least `gathered_tokens` tokens, where it moves less.

    `mlp` "stage": MLP and vocabulary are cut among all ranks of a stage, so that attention alone is sharded by batch
    (section 3.3 there; elsewhere "data-parallel attention"). Otherwise each group of `dp` has them whole.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    mlp: Literal["stationary", "gathered", "stage"] = "stationary"
    gathered_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "ep"):
            if getattr(self, name) < 1:
                raise InvalidConfiguration(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.stage_ranks % self.ep:
            raise InvalidConfiguration(
                f"ep {self.ep} does not divide the {self.stage_ranks} ranks (tp {self.tp} x dp {self.dp}) of a stage"
            )
        if self.mlp == "stage" and self.dp == 1:
            raise InvalidConfiguration("mlp stage is for layouts with dp above 1: without, a stage is one group")

    @classmethod
    def parse(cls, text: str) -> ParallelLayout:
        """From "tp2", "pp2-tp2", "ep4·tp2·dp2", "tp8-gathered", "dp2-stage"; what is not named is 1.

        Raises InvalidConfiguration."""
        found: dict[str, Any] = {}
        for part in re.split(r"[\s,·x*_-]+", text.strip().lower()):
            match = re.fullmatch(r"(tp|pp|dp|ep)=?([0-9]{1,5})|(gathered|stage)", part)
            if match is None or (name := match[1] or "mlp") in found:
                raise InvalidConfiguration(
                    f'layout {text!r} is none; write for example "tp2", "pp2-tp2", "ep4-tp2-dp2", "tp8-gathered", '
                    '"dp2-stage"'
                )
            found[name] = match[3] or int(match[2])
        return cls(**found)

    def __str__(self) -> str:
        named = [f"{name}{getattr(self, name)}" for name in ("pp", "dp", "tp", "ep") if getattr(self, name) > 1]
        if self.mlp != "stationary":
            named.append(self.mlp)
        return "-".join(named) or "tp1"

    @property
    def stage_ranks(self) -> int:
        return self.tp * self.dp

    @property
    def num_ranks(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def dense_tp(self) -> int:
        """Ranks that share each MLP and the vocabulary."""
        return self.stage_ranks if self.mlp == "stage" else self.tp

    def dense_part(self, group: int, index: int) -> int:
        """Which of the `dense_tp` parts a rank holds. Parts of ranks of one index are neighbours."""
        return index * self.dp + group if self.mlp == "stage" else index

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert."""
        return self.stage_ranks // self.ep
