"""Plays many seeds, and says which broke a promise; or one, and tells its story.

python tests/simulation/run.py --seeds 100000 [--first N] [--jobs 2]
python tests/simulation/run.py --replay SEED
"""

from __future__ import annotations

import argparse
import collections
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)  # not this folder, whose modules are named like others'

from tests.simulation import schedule  # noqa: E402
from tests.simulation.loop import MONOTONIC_AT_START_S, Process  # noqa: E402
from tests.simulation.shares import Tally, play_shares  # noqa: E402
from tests.simulation.world import PHASES, Violation, play  # noqa: E402


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
    started_s, all_of_them = time.perf_counter(), Tally()
    for tally in play_shares(seeds, jobs):
        for message in tally.broken:
            print(f"\n{message}", flush=True)
        all_of_them.add(tally)
        done, broken = all_of_them.seeds + len(all_of_them.broken), len(all_of_them.broken)
        took_s = time.perf_counter() - started_s
        left_s = took_s / done * (len(seeds) - done)
        print(f"\r{done} of {len(seeds)} seeds, {broken} broken, {left_s:.0f} s left ", end="", flush=True)
    each_ms, each_virtual_s = took_s / len(seeds) * 1e3, all_of_them.virtual_s / len(seeds)
    print(
        f"\rseeds {seeds.start} to {seeds.stop - 1} in {took_s:.0f} s: {each_ms:.1f} ms of {jobs} processes"
        f" and {each_virtual_s:.1f} simulated s each\n"
    )
    table(all_of_them.hits)
    for title, counts in (
        ("requests", all_of_them.ends),
        ("refused hand-over messages", all_of_them.refused),
        ("done", all_of_them.done),
    ):
        print(f"{title}:", ", ".join(f"{count} {name}" for name, count in counts.most_common()))
    print(f"broken promises: {broken}")
    return 1 if broken else 0


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
