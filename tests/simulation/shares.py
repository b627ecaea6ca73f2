"""Many seeds in several processes. What they came to is the same in whichever order they are played."""

from __future__ import annotations

import collections
import dataclasses
import gc
import multiprocessing
import traceback
from collections.abc import Iterator

from tests.simulation.world import Outcome, Violation, play

SHARE = 50  # seeds that a process plays in one go


@dataclasses.dataclass(slots=True)
class Tally:
    """Of the seeds that were played."""

    seeds: int = 0
    ends: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # as of Outcome, all of it
    hits: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    done: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    virtual_s: float = 0.0
    broken: list[str] = dataclasses.field(default_factory=list)  # what was violated, with its seed

    def count(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.ends.update(outcome.ends)
        self.hits.update(outcome.hits)
        self.refused.update(outcome.refused)
        self.done.update(outcome.done)
        self.virtual_s += outcome.lasted_s

    def add(self, other: Tally) -> None:
        self.seeds += other.seeds
        self.ends.update(other.ends)
        self.hits.update(other.hits)
        self.refused.update(other.refused)
        self.done.update(other.done)
        self.virtual_s += other.virtual_s
        self.broken += other.broken


def play_share(seeds: range) -> Tally:
    tally = Tally()
    for seed in seeds:
        try:
            tally.count(play(seed))
        except Violation as violation:
            tally.broken.append(str(violation))
        except Exception:  # of the simulation itself, or of the product where nothing waits for it: no seed passes so
            tally.broken.append(f"seed {seed}\n{traceback.format_exc()}")
    return tally


def play_shares(seeds: range, jobs: int) -> Iterator[Tally]:
    """One after another, as they are done."""
    shares = [seeds[at : at + SHARE] for at in range(0, len(seeds), SHARE)]
    # Modules are no garbage: frozen, no collection looks at them again.
    with multiprocessing.get_context("spawn").Pool(jobs, initializer=gc.freeze) as pool:
        yield from pool.imap_unordered(play_share, shares)
