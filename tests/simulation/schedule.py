"""What a seed makes of the world: its workers, its requests, and what happens to them when."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence

from tests.simulation.cluster import WorkerPlan
from tests.simulation.model import ADAPTER, VOCAB, truth_of

LONGEST_PROMPT = 36  # with the longest answer it fits into the smallest memory
FAULTS_END_S = 6.0  # after the first request may come; then everything heals

PREFILL_DIES = "prefill dies"
DECODE_DIES = "decode dies"
ROUTER_DIES = "router dies"
CLIENT_LEAVES = "client leaves"
REDIS_AWAY = "Redis away"
SLOW_LINK = "slow link"
CUT_LINK = "cut link"
MESSAGES = "messages lost, repeated, late"
WRITES = "writes fail, come late, spoilt"
STOPPED = "stopped for a while"
RESTART = "restart on the same address"
DRAIN = "drain"
TICKETS = "tickets replayed and forged"
KINDS = (
    *(PREFILL_DIES, DECODE_DIES, ROUTER_DIES, CLIENT_LEAVES, REDIS_AWAY, SLOW_LINK, CUT_LINK, MESSAGES, WRITES),
    *(STOPPED, RESTART, DRAIN, TICKETS),
)
# Not faults of a moment: what requests and memories are like.
OUT_OF_BLOCKS = "out of blocks"
DEADLINE = "deadline passed"


@dataclasses.dataclass(frozen=True, slots=True)
class Fault:
    """From `at_s` for `length_s`. `target` is a process's name, or two with a bar between: a link."""

    at_s: float
    kind: str
    target: str
    length_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class RequestPlan:
    name: str
    at_s: float
    prompt: tuple[int, ...]
    seed: int
    max_tokens: int
    timeout_s: float
    adapter: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    workers: tuple[WorkerPlan, ...]
    routers: tuple[str, ...]
    decode_prefills_tokens: int
    latency_s: float
    digest: str  # as handoff.digest; where not every chunk has one, no write is spoilt
    requests: tuple[RequestPlan, ...]
    faults: tuple[Fault, ...]
    plays_out: bool  # a fault lasts as long as it was to, though nobody is left who could feel it


def schedule_of(seed: int, kinds: Sequence[str] = KINDS) -> Schedule:
    """`kinds`: the faults to draw from."""
    rng = random.Random(seed)
    workers = tuple(
        WorkerPlan(
            role=role,
            worker_id=f"{role}-{index}",
            num_blocks=rng.randint(18, 28),
            block_tokens=rng.choice((3, 4)),
            cut=rng.choice(("", "", "tp2", "pp2")),
            max_step_tokens=rng.choice((6, 10, 16)),
            max_sequences=rng.randint(3, 5),
            lease_s=rng.choice((0.5, 1.0, 3.0)),
            step_s=rng.choice((0.01, 0.03, 0.1)) * (3 if role == "prefill" else 1),
            groups=rng.choice((1, 1, 1, 2)),
            tier=rng.choice(("", "", "host", "disk")),
        )
        for role in ("prefill", "decode")
        for index in range(2)
    )
    routers = tuple(f"router-{index}" for index in range(rng.choice((1, 1, 2))))
    requests = _requests(rng)
    schedule = Schedule(
        seed=seed,
        workers=workers,
        routers=routers,
        decode_prefills_tokens=rng.choice((0, 0, 8)),
        latency_s=rng.choice((0.0003, 0.003, 0.02)),
        digest="always",
        requests=requests,
        faults=_faults(rng, kinds, [worker.worker_id for worker in workers], list(routers), requests),
        plays_out=rng.random() < 0.1,
    )
    return dataclasses.replace(schedule, digest=rng.choice(("always", "always", "always", "sampled", "off")))


def _requests(rng: random.Random) -> tuple[RequestPlan, ...]:
    stem = tuple(rng.randrange(VOCAB) for _ in range(24))
    found = []
    for index in range(rng.choice((2, 2, 3, 3, 4, 6))):
        prompt = stem[: rng.choice((0, 0, 8, 13, 24))]
        prompt += tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 12)))
        found.append(
            RequestPlan(
                name=f"q{index}",
                at_s=rng.uniform(0.0, 1.2),
                prompt=prompt,
                seed=rng.randrange(1 << 32),
                max_tokens=rng.choice((1, 2, 3, 5, 8, 16)),
                timeout_s=rng.choice((0.4, 2.0, 6.0, 12.0)),
                adapter=rng.choice(("", "", "", ADAPTER.name)),
            )
        )
    return (*found, *_conversations(rng, found))


def _conversations(rng: random.Random, begun: Sequence[RequestPlan]) -> Iterator[RequestPlan]:
    """Of some requests the next turn, perhaps before the answer is there: a decode worker holds what no prefill worker
    has computed."""
    for earlier in begun:
        prompt = truth_of(earlier.prompt, earlier.seed, earlier.max_tokens, earlier.adapter).tokens
        prompt += tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 4)))
        if rng.random() < 0.4 and len(prompt) <= LONGEST_PROMPT:
            yield dataclasses.replace(
                earlier,
                name=f"{earlier.name}then",
                at_s=earlier.at_s + rng.uniform(0.2, 2.0),
                prompt=prompt,
                seed=rng.randrange(1 << 32),
            )


def _faults(
    rng: random.Random,
    kinds: Sequence[str],
    workers: list[str],
    routers: list[str],
    requests: tuple[RequestPlan, ...],
) -> tuple[Fault, ...]:
    found = []
    for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4))):
        kind = rng.choice(kinds)
        struck = rng.choice(requests)
        at_s = struck.at_s + rng.choice((rng.expovariate(20.0), rng.expovariate(3.0)))
        length_s = rng.choice((rng.uniform(0.05, 0.5), rng.uniform(0.5, FAULTS_END_S)))
        match kind:
            case "prefill dies" | "decode dies":
                target = rng.choice([worker for worker in workers if worker.startswith(kind.partition(" ")[0])])
            case "router dies":
                target = rng.choice(routers)
            case "client leaves":
                target = struck.name
            case "cut link":
                pair = rng.sample([*workers, *routers, "redis"], 2)
                if rng.random() < 0.5:
                    pair = [rng.choice(workers[:2]), rng.choice(workers[2:])]
                target, length_s = "|".join(pair), rng.choice((length_s, FAULTS_END_S))
            case "stopped for a while" | "slow link":
                target = rng.choice([*workers, *workers, *routers])
                if kind == STOPPED:
                    length_s = rng.choice((length_s, rng.uniform(2.0, 11.0)))
            case "restart on the same address":
                target, length_s = rng.choice([*workers, *workers, *routers]), rng.choice((0.0, rng.uniform(0.0, 0.1)))
            case "drain":
                target = rng.choice(workers)
            case _:
                target = ""
        found.append(Fault(at_s, kind, target, length_s))
    return tuple(sorted(found, key=lambda fault: fault.at_s))
