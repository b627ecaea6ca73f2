"""When requests come, and how long they are. Seeded: the same seed gives the same load on every machine."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterable, Iterator

from legato.bench.lengths import Lengths


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come.

    at_s            seconds after the start; a closed loop, where an answer is what brings the next request, ignores it
    prompt_tokens   None: as long as the text is
    output_tokens   at most
    prefix_ids      names of the blocks that the prompt is made of: equal names are equal tokens; () = a text of its own
    """

    at_s: float
    prompt_tokens: int | None
    output_tokens: int
    prefix_ids: tuple[int, ...] = ()


def poisson_times_s(rate: float, seed: int) -> Iterator[float]:
    """Without end: the gaps of a Poisson process are independent and exponential with mean 1 / rate."""
    uniform = random.Random(f"{seed}/arrivals")
    at_s = 0.0
    while True:
        at_s += uniform.expovariate(rate)
        yield at_s


def drawn(times_s: Iterable[float], prompt: Lengths | None, output: Lengths, seed: int) -> Iterator[Arrival]:
    """An arrival for each time. Lengths have a stream of their own: another rate leaves them as they are."""
    uniform = random.Random(f"{seed}/lengths")
    for at_s in times_s:
        yield Arrival(at_s, prompt.draw(uniform) if prompt else None, output.draw(uniform))


def limited(arrivals: Iterable[Arrival], requests: int | None, duration_s: float | None) -> Iterator[Arrival]:
    """The first `requests` of those that come before `duration_s`; None is no limit. Arrivals are in order of time."""
    if duration_s is not None:
        arrivals = itertools.takewhile(lambda arrival: arrival.at_s < duration_s, arrivals)
    return itertools.islice(arrivals, requests)
