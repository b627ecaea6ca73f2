"""What serving adds to computing: the stream's speed beside the engine alone, and a router's hop beside a bare call.

    ITL    engine alone, this process   |  client -> router -> decode worker, handed over from a prefill worker
    hop    a bare gRPC round trip       |  first token straight from a prefill worker  |  the same through the router

The same stream once more with guesses (prompt lookup): the mean time for a token, and how many guesses were right. One
request in flight; interleaved A-B-A-B in one run; medians of rounds and their spread. The cluster is that of
`legato up`, one prefill and one decode worker as processes, with as many threads as the engine alone has.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.record import append_line
from engine.engine import Engine, EngineOptions
from engine.model_files import open_model
from legato import AsyncClient
from legato.command.local.cluster import LocalCluster
from legato.v1 import common_pb2, inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from scheduler.plan import Draw, Slice, StepPlan
from service.channel import channel
from service.config import ClusterConfig
from service.model_source import resolve_model
from spec.sampling import SamplingParams

KEY = "the key of bench.serving"
EXAMPLES = """examples:
  python -m bench.serving                      SmolLM2 on two threads, two to three minutes
  python -m bench.serving --rounds 9 --tokens 128
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.serving",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2", help="a folder, a .gguf file or smollm2 (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the engine, on both sides (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="A-B pairs (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=40, help="of each kind in a round of hops (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/serving.jsonl"), help="gets one JSON line more")
    asyncio.run(run(parser.parse_args()))


async def run(options: argparse.Namespace) -> None:
    config = ClusterConfig(
        model=options.model, port=0, cluster_key=KEY, engine={"threads": options.threads, "kv_memory": "256MiB"}
    )
    alone = EngineAlone(options)
    with tempfile.TemporaryDirectory() as folder:
        cluster = LocalCluster(config, Path(folder), os.environ)
        await cluster.start()
        try:
            await cluster.wait_ready()
            async with AsyncClient(cluster.address, timeout_s=120) as client:
                itl = await compare_itl(alone, client, options)
                hop = await compare_hops(client, cluster.address, options)
        finally:
            await cluster.stop()
    report(itl, hop, options)


class EngineAlone:
    def __init__(self, options: argparse.Namespace) -> None:
        files = open_model(resolve_model(options.model))
        self._tokens = options.tokens
        self._table = tuple(range(-(-(options.prompt_tokens + options.tokens + 1) // 16)))
        self._engine = Engine(files, EngineOptions(device="cpu", threads=options.threads), len(self._table))
        self._engine.warm_up()
        self.vocab_size = files.spec.vocab_size

    def itl_s(self, prompt: list[int]) -> float:
        """Median seconds between two tokens of one greedy answer."""
        greedy, times = SamplingParams(temperature=0.0), []
        token_ids, start = tuple(prompt), 0
        for _ in range(self._tokens):
            end = start + len(token_ids)
            piece = Slice("bench", token_ids, start, self._table, Draw(greedy, end, len(prompt), ()))
            (drawn,) = self._engine.execute(StepPlan(0, (piece,))).drawn[0]
            times.append(time.perf_counter())
            token_ids, start = (drawn.token_id,), end
        return statistics.median(after - before for before, after in itertools.pairwise(times))


@dataclasses.dataclass(frozen=True, slots=True)
class Itl:
    """Of one round, in seconds: medians, and with guesses the mean, for tokens come several at once."""

    alone: float
    served: float
    served_guessing: float
    proposed_tokens: int
    accepted_tokens: int


async def compare_itl(alone: EngineAlone, client: AsyncClient, options: argparse.Namespace) -> list[Itl]:
    found, draw = [], random.Random(0)
    for number in range(options.rounds + 1):
        prompt = [draw.randrange(3, alone.vocab_size) for _ in range(options.prompt_tokens)]
        one = alone.itl_s(prompt)
        times = []
        async for _ in client.stream(prompt, max_tokens=options.tokens, temperature=0.0, ignore_eos=True):
            times.append(time.perf_counter())
        other = statistics.median(after - before for before, after in itertools.pairwise(times[1:]))
        guessing = await _guessing(client, prompt, options.tokens)
        if number:
            found.append(Itl(one, other, *guessing))
    return found


async def _guessing(client: AsyncClient, prompt: list[int], num_tokens: int) -> tuple[float, int, int]:
    """(mean seconds of a token behind the second piece, guesses, right ones)"""
    pieces = []
    stream = client.stream(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True, speculation="prompt_lookup")
    async for piece in stream:
        pieces.append((time.perf_counter(), len(piece.token_ids)))
    mean_s = (pieces[-1][0] - pieces[1][0]) / sum(tokens for _, tokens in pieces[2:])
    usage = stream.answer.usage
    return mean_s, usage.proposed_tokens, usage.accepted_tokens


async def compare_hops(
    client: AsyncClient, address: str, options: argparse.Namespace
) -> list[tuple[float, float, float]]:
    """(bare unary call, first token from a prefill worker, the same by the router): seconds, medians of a round."""
    view = await client.cluster()
    prefill = next(worker for worker in view.workers if worker.role == "prefill")
    rounds = []
    async with channel(prefill.address, KEY) as link, channel(address) as front:
        for number in range(options.rounds + 1):
            times: tuple[list[float], list[float], list[float]] = ([], [], [])
            for call in range(options.calls):
                for found, work in zip(
                    times, (_bare(link), _direct(link, f"{number}.{call}"), _routed(front)), strict=True
                ):
                    started_s = time.perf_counter()
                    await work
                    found.append(time.perf_counter() - started_s)
            if number:
                rounds.append(tuple(statistics.median(found) for found in times))
    return rounds  # type: ignore[return-value]


async def _bare(link: Any) -> None:
    await worker_pb2_grpc.WorkerStub(link).Describe(worker_pb2.DescribeRequest())


async def _direct(link: Any, name: str) -> None:
    request = worker_pb2.PrefillRequest(
        sequence=worker_pb2.SequenceState(
            sequence_id=f"bench.{name}",
            prompt_token_ids=[5],
            sampling=_one_token(),
            deadline_unix_ns=time.time_ns() + 60_000_000_000,
        )
    )
    async for _ in worker_pb2_grpc.PrefillStub(link).Prefill(request):
        pass


async def _routed(link: Any) -> None:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[5]), options=inference_pb2.AnswerOptions(sampling=_one_token())
    )
    async for _ in inference_pb2_grpc.InferenceStub(link).Generate(request):
        pass


def _one_token() -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(max_tokens=1, top_p=1.0, repetition_penalty=1.0, seed=1)


def report(itl: list[Itl], hop: list[tuple[float, float, float]], options: argparse.Namespace) -> None:
    itl_ratios = [one.served / one.alone for one in itl]
    proposed, accepted = sum(one.proposed_tokens for one in itl), sum(one.accepted_tokens for one in itl)
    acceptance = accepted / proposed if proposed else 0.0
    hop_ratios = [(routed - direct) / bare for bare, direct, routed in hop]
    table = Table("", "median", "spread", title=f"{options.model}, {options.threads} threads, one in flight")

    def row(name: str, values: list[float], unit: str, scale: float) -> None:
        shown = [value * scale for value in values]
        table.add_row(name, f"{statistics.median(shown):.2f}{unit}", f"{min(shown):.2f} to {max(shown):.2f}")

    row("ITL, engine alone", [one.alone for one in itl], " ms", 1e3)
    row("ITL, two pools", [one.served for one in itl], " ms", 1e3)
    row("ratio", itl_ratios, "", 1)
    row("a token, two pools with guesses", [one.served_guessing for one in itl], " ms", 1e3)
    table.add_row("guesses right", f"{acceptance:.0%}", f"{accepted} of {proposed}")
    row("bare gRPC round trip", [bare for bare, _, _ in hop], " ms", 1e3)
    row("first token, prefill worker", [direct for _, direct, _ in hop], " ms", 1e3)
    row("first token, through the router", [routed for _, _, routed in hop], " ms", 1e3)
    row("hop, in bare round trips", hop_ratios, "", 1)
    Console().print(table)
    results = {"itl": [dataclasses.asdict(one) for one in itl], "itl_ratio": statistics.median(itl_ratios)}
    results |= {"acceptance": acceptance, "hop_s": hop}
    results["hop_ratio"] = statistics.median(hop_ratios)
    append_line(options.results, "serving", options, results)


if __name__ == "__main__":
    main()
