"""The ranks of a worker, joined by torch.distributed: NCCL on GPUs, Gloo on a CPU.

A rank alone has none of it, and every operation here is then the identity. All operations of a rank are issued by one
thread, in the same order on every rank: the order of the steps that the driver sends.

A peer that dies closes its connections, and what waits for it raises at once; `timeout_s` bounds what is left (a peer
that is stopped, a network that swallows packets). Either becomes WorkerLost: the worker ends, and comes back whole.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from spec.errors import WorkerLost
from spec.shard import RankShard


class Groups:
    """`tensor` are the tp ranks of this rank's group, `stage` all ranks of its stage, `peers` those of one index in the
    groups of its stage, one of each; None where it is alone there, or the layout has no use for them."""

    def __init__(
        self,
        shard: RankShard,
        device: torch.device,
        tensor: dist.ProcessGroup | None = None,
        stage: dist.ProcessGroup | None = None,
        peers: dist.ProcessGroup | None = None,
    ) -> None:
        self.shard, self._device = shard, device
        self._tensor, self._stage, self._peers = tensor, stage, peers
        self.waited_s = 0.0  # in receive(), for the stage before
        self._sends: list[tuple[dist.Work, Tensor]] = []  # a tensor lives until it has left

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the group's tensors, in place of x. On a CPU an element's bits do not depend on its place in x."""
        if self._tensor is None or not x.numel():
            return x
        if x.is_cpu and self.shard.layout.tp > 2:  # of two, order makes no difference
            return x.copy_(_added(self._every(x)))
        with _typed():
            dist.all_reduce(x, group=self._tensor)
        return x

    def _every(self, x: Tensor) -> Tensor:
        """The tensors of the group's ranks, alike in shape: [tp, *x.shape]."""
        out = x.new_empty(self.shard.layout.tp, *x.shape)
        with _typed():
            dist.all_gather_single(out.flatten(0, 1), x.contiguous(), group=self._tensor)
        return out

    def sum_all(self, x: Tensor) -> Tensor:
        """The sum of the tensors of all ranks of the worker, in place of x."""
        if self.shard.layout.num_ranks > 1:
            with _typed():
                dist.all_reduce(x)
        return x

    def gather(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """The tensors of the group's ranks by index, of which the first dimension is `sizes[index]`."""
        if self._tensor is None:
            return [x]
        most = max(sizes)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: x.shape[0]] = x
        out = x.new_empty(len(sizes) * most, *x.shape[1:])
        with _typed():
            dist.all_gather_single(out, padded, group=self._tensor)
        return [out[index * most : index * most + size] for index, size in enumerate(sizes)]

    def broadcast(self, x: Tensor, index: int) -> None:
        """Of the group's rank `index`, into x."""
        assert self._tensor is not None
        with _typed():
            dist.broadcast(x, group=self._tensor, group_src=index)

    def exchange(self, rows: Tensor, counts: Sequence[int], received: Sequence[int]) -> Tensor:
        """All to all in the stage: `rows` holds counts[r] rows for rank r, one after the other, and what comes back
        received[r] of each."""
        assert self._stage is not None
        return _exchanged(rows, counts, received, self._stage)

    def exchange_counts(self, counts: Sequence[int]) -> list[int]:
        """counts[r] rows will go to rank r of the stage; returns how many come from each."""
        assert self._stage is not None
        out = torch.empty(len(counts), dtype=torch.int64, device=self._device)
        with _typed():
            dist.all_to_all_single(out, torch.tensor(counts, device=self._device), group=self._stage)
        found: list[int] = out.tolist()
        return found

    def gather_rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all groups of the stage, one group after the other; `counts[group]` are its rows. An all-to-all,
        so that no group is padded to the rows of the largest (with Gloo it is the faster operation, too)."""
        assert self._peers is not None
        own = [x.shape[0]] * len(counts)
        return _exchanged(torch.cat([x] * len(counts)), own, counts, self._peers)

    def scatter_rows(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """The sum over the groups' tensors [sum(counts), ...], of it the rows of this rank's group."""
        assert self._peers is not None
        own = counts[self.shard.group]
        pieces = _exchanged(x, counts, [own] * len(counts), self._peers)
        return _added(pieces.view(len(counts), own, *x.shape[1:]))

    def exchange_columns(self, x: Tensor, counts: Sequence[int], widths: Sequence[int]) -> Tensor:
        """x: [sum(counts), widths[group]], of the rows of all groups the columns that this rank has. Returns all
        columns, [counts[group], sum(widths)], of the rows of its group."""
        assert self._peers is not None
        group = self.shard.group
        sent, received = [count * widths[group] for count in counts], [counts[group] * width for width in widths]
        pieces = torch.split(_exchanged(x.flatten(), sent, received, self._peers), received)
        return torch.cat([each.view(counts[group], width) for each, width in zip(pieces, widths, strict=True)], 1)

    def send(self, hidden: Tensor) -> None:
        """To the same place in the next stage; returns before it has arrived."""
        with _typed():
            self._sends = [(work, tensor) for work, tensor in self._sends if not work.is_completed()]
            work = dist.isend(hidden, self.shard.rank + self.shard.layout.stage_ranks)
            assert work is not None
            self._sends.append((work, hidden))

    def receive(self, hidden: Tensor) -> Tensor:
        """From the same place in the stage before, into `hidden`."""
        started_s = time.monotonic()
        with _typed():
            dist.recv(hidden, self.shard.rank - self.shard.layout.stage_ranks)
        self.waited_s += time.monotonic() - started_s
        return hidden

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def join(shard: RankShard, address: str, device: torch.device, timeout_s: float = 60.0) -> Groups:
    """Called by every rank at once; returns when all are there. `address` is host:port at which rank 0 listens.

    Raises WorkerLost when they are not within `timeout_s`."""
    layout = shard.layout
    if layout.num_ranks == 1:
        return Groups(shard, device)
    timeout = datetime.timedelta(seconds=timeout_s)  # given to each group: none takes it from another
    with _typed():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}",
            rank=shard.rank,
            world_size=layout.num_ranks,
            timeout=timeout,
        )
        tensor = stage = peers = None
        for first in range(0, layout.num_ranks, layout.tp) if layout.tp > 1 else ():
            group = dist.new_group(list(range(first, first + layout.tp)), timeout)
            if first <= shard.rank < first + layout.tp:
                tensor = group
        for first in range(0, layout.num_ranks, layout.stage_ranks) if layout.stage_ranks > 1 else ():
            group = dist.new_group(list(range(first, first + layout.stage_ranks)), timeout)
            if first <= shard.rank < first + layout.stage_ranks:
                stage = group
        for first in range(0, layout.num_ranks, layout.stage_ranks) if layout.mlp == "stage" else ():
            for index in range(layout.tp):
                ranks = list(range(first + index, first + layout.stage_ranks, layout.tp))
                group = dist.new_group(ranks, timeout)
                if shard.rank in ranks:
                    peers = group
        return Groups(shard, device, tensor, stage, peers)


def _added(parts: Tensor) -> Tensor:
    """[ranks, ...] -> [...], the sum in the order of ranks, rounded to the dtype once. On a CPU each element alike,
    where a reduction of torch or Gloo adds up otherwise in another place. `parts` may be written over."""
    if parts.is_cuda:
        return parts.sum(0, dtype=parts.dtype)
    total = parts[0].float() if parts.dtype in (torch.bfloat16, torch.float16) else parts[0]
    for part in parts[1:]:
        total += part
    return total.to(parts.dtype)


def _exchanged(x: Tensor, counts: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    with _typed():
        dist.all_to_all_single(out, x.contiguous(), list(received), list(counts), group=group)
    return out


@contextlib.contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # torch raises these for a peer that is gone and for a timeout
        raise WorkerLost(f"the ranks of this worker have lost each other: {error}") from error
