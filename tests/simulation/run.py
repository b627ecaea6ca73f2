"""Plays many seeds, and says which broke a promise; or one, and tells its story.

python tests/simulation/run.py --seeds 100000 [--first N] [--jobs 2]
python tests/simulation/run.py --replay SEED
"""

from __future__ import annotations

import argparse
import collections
import logging
import multiprocessing
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder, whose modules are named like others'

from tests.simulation import schedule  # noqa: E402
from tests.simulation.loop import MONOTONIC_AT_START_S, Process  # noqa: E402
from tests.simulation.world import PHASES, Outcome, Violation, play  # noqa: E402

SHARE = 50  # seeds that a process plays in one go


def play_share(seeds: range) -> tuple[list[Outcome], list[str]]:
    outcomes, broken = [], []
    for seed in seeds:
        try:
            outcomes.append(play(seed))
        except Violation as violation:
            broken.append(str(violation))
        except Exception:  # of the simulation itself, or of the product where nothing waits for it: no seed passes so
            broken.append(f"seed {seed}\n{traceback.format_exc()}")
    return outcomes, broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--replay", type=int, metavar="SEED")
    given = parser.parse_args()
    if given.replay is not None:
        return replay(given.replay)
    return play_all(range(given.first, given.first + given.seeds), given.jobs)


def play_all(seeds: range, jobs: int) -> int:
    started_s, done = time.perf_counter(), 0
    ends: collections.Counter[str] = collections.Counter()
    hits: collections.Counter[tuple[str, str]] = collections.Counter()
    refused: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    virtual_s, fetched_tokens = 0.0, 0
    shares = [seeds[at : at + SHARE] for at in range(0, len(seeds), SHARE)]
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        for outcomes, broken in pool.imap_unordered(play_share, shares):
            for outcome in outcomes:
                ends += outcome.ends
                hits += outcome.hits
                refused += outcome.refused
                virtual_s += outcome.lasted_s
                fetched_tokens += outcome.fetched_tokens
            for message in broken:
                print(f"\n{message}", flush=True)
            failures += broken
            done += len(outcomes) + len(broken)
            took_s = time.perf_counter() - started_s
            left_s = took_s / done * (len(seeds) - done)
            print(f"\r{done} of {len(seeds)} seeds, {len(failures)} broken, {left_s:.0f} s left ", end="", flush=True)
    took_s = time.perf_counter() - started_s
    print(
        f"\r{done} seeds in {took_s:.0f} s: {took_s / done * 1e3:.1f} ms and {virtual_s / done:.1f} simulated s each\n"
    )
    table(hits)
    print("\nrequests:", ", ".join(f"{count} {end}" for end, count in ends.most_common()))
    print("refused hand-over messages:", ", ".join(f"{count} {why}" for why, count in refused.most_common()))
    print(f"tokens of prefixes fetched: {fetched_tokens}")
    print(f"broken promises: {len(failures)}")
    return 1 if failures else 0


def table(hits: collections.Counter[tuple[str, str]]) -> None:
    """Requests that a fault found in each phase."""
    print(f"{'':34}" + "".join(f"{phase:>12}" for phase in PHASES))
    for kind in schedule.KINDS:
        print(f"{kind:34}" + "".join(f"{hits[kind, phase]:>12}" for phase in PHASES))


class _Story(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        try:
            name = Process.current().name
        except LookupError:
            name = "world"
        return f"{time.monotonic() - MONOTONIC_AT_START_S:9.4f} s  {name:12} {super().format(record)}"


def replay(seed: int) -> int:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Story("%(name)s %(message)s"))
    logging.getLogger("legato").addHandler(handler)
    logging.getLogger("legato").setLevel(logging.DEBUG)
    planned = schedule.schedule_of(seed)
    for line in (*planned.workers, *planned.requests, *planned.faults):
        print(line)
    try:
        print(play(seed))
    except Violation as violation:
        print(violation)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
