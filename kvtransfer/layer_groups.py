"""In which groups of layers a chunk leaves while it is computed. Pure.

More groups hide more of the transfer behind the computation, and cut what is sent into smaller pieces: a block leaves
in one piece for each group. What is still to be sent when the computation ends is the last group, so that one is small.

    32 layers, six groups    |·····|·····|·····|·····|·····|··|·|·|        the last is halved until it is one layer
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_GROUPS = 8  # before the last one is halved
_SMALLEST_SHARE = 8  # of a group's bytes, in the last one


def layer_group_ends(num_layers: int, nbytes: int, group_bytes: int) -> tuple[int, ...]:
    """Where each group of layers ends, rising, the last at `num_layers`; one alone where all is too little to cut.

    nbytes       of the chunk, in all layers
    group_bytes  a group has at least so many; those at the end an eighth of it
    """
    groups = max(1, min(MOST_GROUPS, num_layers, nbytes // group_bytes))
    ends = [num_layers * (group + 1) // groups for group in range(groups)]
    start = ends[-2] if groups > 1 else num_layers
    while (half := (num_layers - start) // 2) and nbytes * half * _SMALLEST_SHARE >= group_bytes * num_layers:
        start = num_layers - half
        ends.insert(-1, start)
    return tuple(ends)


def ends_within(ends: Sequence[int], layers: range) -> tuple[int, ...]:
    """Those at which a rank that holds `layers` has something new, counted in its own layers; its last is one."""
    found = {min(end, layers.stop) - layers.start for end in ends if end > layers.start}
    return tuple(sorted(found | {len(layers)}))
