"""The legal life of a sequence on one worker.

                    ┌───────────── PREEMPTED ◀──┐ its blocks are given up; it waits at the front
                    ▼                           │
NEW ──▶ WAITING ──▶ RUNNING ────────────────────┘
 │                  │ ▲  └──▶ HELD       it drew what it should here, or was taken out; its blocks stay until
 └──── adopted ─────┼─┘        │         release(), or until it is put back into the stage that its blocks allow
                    └──▶ LEAVING         it ended while a step writes its blocks; they go at that step's commit
                             └──▶ ENDED  no block, no place in any line
"""

from __future__ import annotations

import enum


class Stage(enum.Enum):
    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    HELD = "held"
    LEAVING = "leaving"
    ENDED = "ended"


TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.NEW: frozenset({Stage.WAITING, Stage.RUNNING}),
    Stage.WAITING: frozenset({Stage.RUNNING, Stage.ENDED}),
    Stage.RUNNING: frozenset({Stage.PREEMPTED, Stage.HELD, Stage.LEAVING, Stage.ENDED}),
    Stage.PREEMPTED: frozenset({Stage.RUNNING, Stage.HELD, Stage.ENDED}),
    Stage.HELD: frozenset({Stage.RUNNING, Stage.PREEMPTED, Stage.ENDED}),
    Stage.LEAVING: frozenset({Stage.ENDED}),
    Stage.ENDED: frozenset(),
}


def advance(stage: Stage, to: Stage) -> Stage:
    """`to`, if the table allows it; anything else is a defect of ours."""
    assert to in TRANSITIONS[stage], f"no sequence goes from {stage.value} to {to.value}"
    return to
