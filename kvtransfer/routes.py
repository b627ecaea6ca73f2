"""From all ranks of one worker to all ranks of another: who sends what, and the pieces of the two regions. Pure.

A worker registers one region a host with each transport; the KV memory of each rank lies in its host's at an offset. A
rank holds a rectangle of the model: its layers × its KV heads. Ranks that hold the same rectangle are replicas.

    target rank: every (layer, head) of its rectangle comes from exactly one source rank   (all replicas are written)
    source rank: one of the replicas of a rectangle is read, in turn by target rank        (any of them holds the same)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from kvtransfer.grids import Grid, Sums, TransferPlan
from kvtransfer.plan import RankGrids, RankKV, common, segments_of
from legato.v1 import worker_pb2
from spec.errors import InvalidConfiguration, InvalidParameter
from spec.layout import KVLayout


@dataclasses.dataclass(frozen=True, slots=True)
class RankMemory:
    """What one rank holds, and where. Block ids of a sequence are the same on all ranks of its `group` (among dp)."""

    kv: RankKV
    group: int = 0
    offset_bytes: int = 0  # of the rank's KV memory within its host's region
    host: int = 0  # its number among the worker's; rank 0's is 0


class Route(NamedTuple):
    """Source rank number `source` sends to target rank number `target` what both hold."""

    source: int
    target: int
    layers: range
    heads: range


@functools.lru_cache(maxsize=256)
def routes_between(sources: tuple[RankKV, ...], targets: tuple[RankKV, ...]) -> tuple[Route, ...]:
    """In the order of the targets. Raises InvalidConfiguration when a target needs what no source holds."""
    replicas: dict[tuple[range, range], list[int]] = {}
    for number, source in enumerate(sources):
        replicas.setdefault((source.layers, source.heads), []).append(number)
    taken = dict.fromkeys(replicas, 0)
    routes: list[Route] = []
    for number, target in enumerate(targets):
        covered = 0
        for rectangle, holders in replicas.items():
            layers, heads = common(rectangle[0], target.layers), common(rectangle[1], target.heads)
            if not layers or not heads:
                continue
            routes.append(Route(holders[taken[rectangle] % len(holders)], number, layers, heads))
            taken[rectangle] += 1
            covered += len(layers) * len(heads)
        needed = len(target.layers) * len(target.heads)
        assert covered <= needed, "ranks hold the same rectangle or disjoint ones"
        if covered < needed:
            raise InvalidConfiguration(
                f"of layers {target.layers.start} to {target.layers.stop - 1} and KV heads {target.heads.start} to "
                f"{target.heads.stop - 1}, which a rank of the peer needs, the ranks here hold {covered} of {needed}"
            )
    return tuple(routes)


class HandoffPlan:
    """The pieces that carry tokens [first_token, first_token + num_tokens) of all heads, in region offsets: what does
    not depend on layers is found once, however many shipments of some layers each they leave in. Immutable, but for the
    sums; any thread may ask."""

    def __init__(
        self,
        source_ranks: Sequence[RankMemory],
        source_blocks: Sequence[int],
        target_ranks: Sequence[RankMemory],
        target_blocks: Sequence[int],
        first_token: int,
        num_tokens: int,
        sums: Sequence[Sums | None] | None = None,
    ) -> None:
        """`sums`: to which the rows are added that go to each target rank, None where they are not.

        The ranks are those of one group on either side; both block tables begin at token 0 of the sequence. Raises as
        plan_transfer() and routes_between() do."""
        routes = routes_between(tuple(rank.kv for rank in source_ranks), tuple(rank.kv for rank in target_ranks))
        layouts = source_ranks[0].kv.layout, target_ranks[0].kv.layout
        segments = segments_of(layouts[0], source_blocks, layouts[1], target_blocks, first_token, num_tokens)
        self._routes: list[tuple[int, range, RankGrids]] = []  # each to a host of the target
        for route in routes:
            source, target = source_ranks[route.source], target_ranks[route.target]
            assert source.kv.layout.block_tokens == layouts[0].block_tokens
            assert target.kv.layout.block_tokens == layouts[1].block_tokens
            places = source.kv, source.offset_bytes, target.kv, target.offset_bytes
            counted = None if sums is None else sums[route.target]
            self._routes.append((target.host, route.layers, RankGrids(segments, *places, counted)))

    def of(self, layers: range | None = None, target_host: int = 0) -> TransferPlan:
        """Of all layers, or of some: what goes to ranks on that host."""
        grids: list[Grid] = []
        for host, held, rank_grids in self._routes:
            if host == target_host:
                grids += rank_grids.of(held if layers is None else layers)
        return TransferPlan(grids)


# ---- what peers are told of a worker's ranks -------------------------------------------------------------------------


def layout_id(ranks: Sequence[RankMemory]) -> str:
    """Names where every byte of a worker's (or a group's) KV lies: equal ids, equal plans."""
    first, layout = ranks[0], ranks[0].kv.layout
    place = first.kv, first.group, first.offset_bytes, first.host
    if len(ranks) == 1 and place == (RankKV.whole(layout), 0, 0, 0):
        return layout.layout_id
    hasher = hashlib.blake2b(digest_size=8, person=b"legato-ranks")
    for rank in ranks:
        layers, heads = rank.kv.layers, rank.kv.heads
        hasher.update(
            f"{rank.kv.layout.layout_id} layers {layers.start}:{layers.stop} heads {heads.start}:{heads.stop}"
            f" group {rank.group} at {rank.offset_bytes} on {rank.host}\n".encode()
        )
    return f"ranks/{len(ranks)}/d{layout.head_dim}/t{layout.block_tokens}/{layout.dtype.value}/{hasher.hexdigest()}"


def whole_layout(ranks: Sequence[RankMemory]) -> KVLayout:
    """Of one rank that held all that these hold."""
    return dataclasses.replace(
        ranks[0].kv.layout,
        num_layers=max(rank.kv.layers.stop for rank in ranks),
        num_kv_heads=max(rank.kv.heads.stop for rank in ranks),
    )


def ranks_to_proto(ranks: Iterable[RankMemory]) -> list[worker_pb2.RankKV]:
    return [
        worker_pb2.RankKV(
            first_layer=rank.kv.layers.start,
            num_layers=len(rank.kv.layers),
            first_head=rank.kv.heads.start,
            num_heads=len(rank.kv.heads),
            group=rank.group,
            offset_bytes=rank.offset_bytes,
            host=rank.host,
        )
        for rank in ranks
    ]


def ranks_from_proto(whole: KVLayout, messages: Iterable[worker_pb2.RankKV]) -> tuple[RankMemory, ...]:
    """`whole`: of the model, all layers and heads. Raises InvalidParameter when a rank holds none or more than these,
    or when there is no rank."""
    ranks = []
    for message in messages:
        layers = range(message.first_layer, message.first_layer + message.num_layers)
        heads = range(message.first_head, message.first_head + message.num_heads)
        if not layers or not heads or layers.stop > whole.num_layers or heads.stop > whole.num_kv_heads:
            raise InvalidParameter(
                f"layers {layers} and KV heads {heads} are not within {whole.num_layers} layers and "
                f"{whole.num_kv_heads} KV heads",
                field="ranks",
            )
        layout = dataclasses.replace(whole, num_layers=len(layers), num_kv_heads=len(heads))
        ranks.append(RankMemory(RankKV(layout, layers, heads), message.group, message.offset_bytes, message.host))
    if not ranks:
        raise InvalidParameter("are none", field="ranks")
    return tuple(ranks)
