"""Attention sharded by batch: MLPs and vocabulary are cut over all ranks of a stage (`mlp` "stage" of a layout), while
each group of the stage attends for rows of its own (Pope et al. 2022, arXiv:2211.05102, section 3.3).

    the group's rows ──gather──▶ rows of all groups ──a rank's part──▶ partial sums ──scatter──▶ the group's, summed

All ranks of a stage do this in every dense layer of every step, also those whose group has no row. So at the start of
a step each group says how many rows it has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from engine.groups import Groups
from engine.projection import Segments
from engine.step import StepTensors

PROMPT_ROWS_AT_ONCE = 64  # whose logits exist at the same time when log-probabilities of a prompt are asked for


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class GroupRows:
    """Rows of all groups of the stage, one group after the other."""

    counts: tuple[int, ...]  # [dp]
    adapters: Segments = ()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StageStep:
    """Of one step, what the groups of the stage have in it; the same on every rank of the stage."""

    rows: GroupRows
    wanted: GroupRows  # rows that go through the head
    drawn: tuple[int, ...]  # [dp]; of each group's wanted rows the first

    def head_counts(self) -> Iterator[tuple[int, ...]]:
        """Rows of each group that go through the head at once: those that draw, then runs of the others."""
        yield self.drawn
        left = [wanted - drawn for wanted, drawn in zip(self.wanted.counts, self.drawn, strict=True)]
        while any(left):
            taken = [min(rows, PROMPT_ROWS_AT_ONCE) for rows in left]
            left = [rows - some for rows, some in zip(left, taken, strict=True)]
            yield tuple(taken)


def meet(
    groups: Groups, device: torch.device, adapters: Sequence[str], step: StepTensors | None, num_drawn: int
) -> StageStep:
    """Called on every rank of the stage at the start of a step. `adapters`: all that are loaded, in one order on all
    ranks. `step`: of the rank's group, None where it has no row; `num_drawn`: how many of its wanted rows draw."""
    layout = groups.shard.layout
    num_rows = num_wanted = 0
    if step is not None:
        num_rows = step.positions.shape[0]
        num_wanted = num_rows if step.wanted_rows is None else step.wanted_rows.shape[0]
    has_adapters = step is not None and bool(step.adapters)
    own = torch.tensor([[num_rows, num_wanted, num_drawn, has_adapters]], device=device)
    rows, wanted, drawn, asked = zip(*groups.gather_rows(own, (1,) * layout.dp).tolist(), strict=True)
    if not any(asked):
        return StageStep(GroupRows(rows), GroupRows(wanted), drawn)

    def everyones(own_segments: Segments, counts: tuple[int, ...]) -> GroupRows:
        numbers = torch.zeros(counts[groups.shard.group], dtype=torch.int64, device=device)
        for name, at in own_segments:
            numbers[at] = 1 + adapters.index(name)
        found = groups.gather_rows(numbers, counts)
        places = [(name, torch.nonzero(found == 1 + number).flatten()) for number, name in enumerate(adapters)]
        return GroupRows(counts, tuple((name, at) for name, at in places if at.numel()))

    return StageStep(
        everyones(() if step is None else step.adapters, rows),
        everyones(() if step is None else step.wanted_adapters, wanted),
        drawn,
    )
