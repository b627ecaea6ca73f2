"""What a client heard: when each token of an answer came, and how the answer ended."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence

from bench.pools import Pools, PoolsFailed


@dataclasses.dataclass(slots=True)
class Heard:
    """Of one request; grows while it runs. Times are seconds since it was sent."""

    prompt: list[int]
    num_tokens: int  # asked for
    sent_s: float = 0.0  # time.perf_counter()
    times_s: list[float] = dataclasses.field(default_factory=list)  # of each token
    token_ids: list[int] = dataclasses.field(default_factory=list)
    ended_s: float = 0.0
    failure: str = ""  # in the words of the system

    @property
    def ttft_s(self) -> float:
        return self.times_s[0]

    @property
    def first_to_second_s(self) -> float:
        return self.times_s[1] - self.times_s[0]

    @property
    def itl_s(self) -> float:
        """Behind the second token, the mean: tokens that came in one message are evened out."""
        return (self.times_s[-1] - self.times_s[1]) / (len(self.times_s) - 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Loop:
    """A closed loop that every side is asked for: `in_flight` clients, until all prompts are answered."""

    name: str
    in_flight: int
    prompts: list[list[int]]


@dataclasses.dataclass(frozen=True, slots=True)
class Round:
    """By side: (tokens/s, answers) of each loop; and cores that nobody of the bench kept busy meanwhile."""

    loops: list[Loop]
    sides: dict[str, list[tuple[float, list[Heard]]]]
    others_cores: dict[str, float]


async def hear(pools: Pools, heard: Heard, timeout_s: float) -> Heard:
    """Sends the request, and fills `heard` in as tokens come. A failure is written down, never raised."""
    heard.sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(timeout_s):
            async for token_ids in pools.stream(heard.prompt, heard.num_tokens):
                now_s = time.perf_counter() - heard.sent_s
                heard.times_s += [now_s] * len(token_ids)
                heard.token_ids += token_ids
        if len(heard.token_ids) != heard.num_tokens:
            heard.failure = f"ended after {len(heard.token_ids)} of {heard.num_tokens} tokens"
    except TimeoutError:
        heard.failure = f"no end within {timeout_s:g} s"
    except PoolsFailed as error:
        heard.failure = str(error)
    heard.ended_s = time.perf_counter() - heard.sent_s
    return heard


async def closed_loop(
    pools: Pools, prompts: Sequence[list[int]], num_tokens: int, in_flight: int, timeout_s: float
) -> tuple[float, list[Heard]]:
    """Each of `in_flight` clients sends its next prompt when it has its answer. (tokens/s, what they heard): all tokens
    over the time from the first request to the last answer."""
    waiting, found = list(reversed(prompts)), []

    async def client() -> None:
        while waiting:
            found.append(await hear(pools, Heard(waiting.pop(), num_tokens), timeout_s))

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(in_flight)))
    return sum(len(one.token_ids) for one in found) / (time.perf_counter() - started_s), found
