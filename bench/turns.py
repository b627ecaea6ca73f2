"""Turns of several sides, one after the other, and whether the machine held still while they ran."""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Sequence

import psutil
import torch

from bench.bandwidth import read_bandwidth
from bench.side import Side

SAME_BANDWIDTH = 0.15
SPARE_CORES = 0.15  # what others may use of the cores that a turn needs, and idle sides at all


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """`num_tokens` 1: the time to the first token. More: the median time between two."""

    name: str
    num_prompts: int
    prompt_tokens: int
    num_tokens: int

    def seconds(self, times_s: Sequence[float]) -> float:
        if self.num_tokens == 1:
            return times_s[0]
        return statistics.median(after - before for before, after in itertools.pairwise(times_s))


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    seconds: float  # the workload's figure
    first_token_ids: list[int]  # of each prompt
    bandwidths: tuple[float, float]  # bytes per second that memory was read at, before and after
    others_cores: float  # that anybody but the side at work kept busy, on average
    idle_sides_cores: float  # of these, the sides that were not asked


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """One turn of each side, by name."""

    workload: Workload
    turns: dict[str, Turn]


def take_round(workload: Workload, prompts: list[list[int]], sides: Sequence[Side], memory: torch.Tensor) -> Round:
    """Raises SideFailed."""
    return Round(workload, {side.name: take_turn(workload, prompts, side, sides, memory) for side in sides})


def take_turn(
    workload: Workload, prompts: list[list[int]], side: Side, sides: Sequence[Side], memory: torch.Tensor
) -> Turn:
    before = read_bandwidth(memory)
    busy_s, own_s, started_s = machine_busy_s(), side.cpu_s(), time.perf_counter()
    idle_s = sum(other.cpu_s() for other in sides if other is not side)
    generated = side.generate(prompts, workload.num_tokens)
    took_s = time.perf_counter() - started_s
    others_s = (machine_busy_s() - busy_s) - (side.cpu_s() - own_s)
    idle_s = sum(other.cpu_s() for other in sides if other is not side) - idle_s
    side.settle()
    return Turn(
        seconds=workload.seconds(generated.times_s),
        first_token_ids=[token_ids[0] for token_ids in generated.token_ids],
        bandwidths=(before, read_bandwidth(memory)),
        others_cores=max(0.0, others_s / took_s),
        idle_sides_cores=idle_s / took_s,
    )


def disturbances(one: Round, usual_bandwidth: float, num_threads: int) -> list[str]:
    """Why the round is not to be trusted; empty: the machine held still."""
    found = []
    spare_cores = max(0, (os.cpu_count() or 1) - num_threads) + SPARE_CORES
    for name, turn in one.turns.items():
        worst = max(turn.bandwidths, key=lambda bandwidth: abs(bandwidth / usual_bandwidth - 1.0))
        if abs(worst / usual_bandwidth - 1.0) > SAME_BANDWIDTH:
            found.append(f"memory was read at {worst / usual_bandwidth:.0%} of the usual speed around {name}")
        if turn.others_cores > spare_cores:
            found.append(f"others used {turn.others_cores:.1f} cores while {name} computed")
        if turn.idle_sides_cores > SPARE_CORES:
            found.append(f"idle sides used {turn.idle_sides_cores:.1f} cores while {name} computed")
    return found


def usual_bandwidth(rounds: Sequence[Round]) -> float:
    return statistics.median(value for one in rounds for turn in one.turns.values() for value in turn.bandwidths)


def machine_busy_s() -> float:
    """CPU seconds of all cores that were not idle, those that the hypervisor gave to others included."""
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
