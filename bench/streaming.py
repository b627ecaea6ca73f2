"""What of a hand-over a client waits for when blocks leave layer group by layer group, and what its digests cost.

One chunk goes from a worker's KV memory to another's, in a process of its own (bench/streaming_target.py) and on the
other half of the cores, by worker/sender.py over a real transport, and is digested on both sides as production does it.
Its computation is a pause before each layer, as on a device that leaves the host alone; all layers together take
`--compute` times what the transfer takes by itself. Exposed is the time from the end of the last layer until the
receiver has found the digests right.

    serial      nothing leaves before the step has ended: all of the transfer is exposed
    streamed    layers leave in groups while the next ones are computed
    full rate   nothing is computed: digests always and off, one after the other

Variants take turns in one run; figures are medians over the rounds, shares are of the serial time of the same run, and
what digests cost is a ratio of the same round. CPU time is of all threads of both ends: it tells more than the clock
where the machine is not quiet. A run is thrown away when the serial time moved by more than 15 % (quartiles).
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import torch
import uvloop
from rich.console import Console
from rich.table import Table

from bench.record import append_line
from bench.streaming_target import (
    CLUSTER_KEY,
    TRANSPORTS,
    Verdict,
    Where,
    add_shape_arguments,
    layout_of,
    registered,
    settle_in,
)
from kvtransfer.digest import DigestPolicy
from kvtransfer.layer_groups import layer_group_ends
from kvtransfer.plan import RankKV
from kvtransfer.routes import RankMemory
from kvtransfer.transport import Transport
from legato.v1 import worker_pb2, worker_pb2_grpc
from service.channel import channel
from spec.errors import TransferFailed
from worker.core import CoreRank
from worker.departures import Target, Way
from worker.link import Link
from worker.sender import Sender
from worker.staging import SourceKV

EXAMPLES = """examples:
  python -m bench.streaming                          half a minute
  python -m bench.streaming --transport sockets --compute 2
"""
STEADY = 0.15
LEASE_S = 60.0
SERIAL, STREAMED, FULL_RATE = "serial", "streamed", "full rate"
SHARES = {"digests always": 1.0, "digests off": 0.0}


class Exposed(NamedTuple):
    """Of one hand-over."""

    seconds: float  # from the end of the last layer to the receiver's verdict
    near_cpu_s: float  # of all threads, from its begin to its end
    far_cpu_s: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.streaming",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_shape_arguments(parser)
    parser.add_argument("--group-mib", type=float, default=1.0, help="handoff.layer_group_bytes (default: %(default)s)")
    parser.add_argument("--compute", type=float, default=1.5, help="times the transfer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="of all variants (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/streaming.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


class Pair:
    """A worker of one rank in this process, and its way to the one in the other."""

    def __init__(self, options: argparse.Namespace, near: Transport, where: Where, told: IO[str]) -> None:
        self.layout, self.tokens = layout_of(options), options.tokens
        self._group_bytes = int(options.group_mib * 2**20)
        self._num_blocks = self.layout.blocks_for(options.tokens)
        region, ranks = registered(near, self.layout, options.tokens)
        self._source = SourceKV(lambda group: ranks, region, near.register, _no_stage)
        descriptor = bytes.fromhex(where.descriptor_hex)
        self._peer = near.connect(bytes.fromhex(where.transport_address_hex), descriptor)
        self._pool, self._link = concurrent.futures.ThreadPoolExecutor(2), Link()
        self._transport, self._told, self._far_cpu_s = near.name, told, 0.0

    def _target(self) -> Target:
        ranks = (RankMemory(RankKV.whole(self.layout)),)
        ticket = worker_pb2.Ticket(
            reservation_id="r",
            num_tokens=self.tokens,
            block_ids=torch.randperm(self._num_blocks).tolist(),
            expires_unix_ns=time.time_ns() + int(LEASE_S * 1e9),
        )
        signed = worker_pb2.SignedTicket(ticket=ticket.SerializeToString())
        return Target(ticket, signed, ranks, (Way(0, self._peer, self._link),), self._transport, LEASE_S)

    async def hand_over(
        self, stub: worker_pb2_grpc.WorkerStub, *, share: float, compute_s: float, streamed: bool
    ) -> Exposed:
        """Raises what went wrong."""
        sender = Sender(stub, self._source, self._target(), "127.0.0.1:1", self._pool, DigestPolicy(share))
        began_cpu_s = time.process_time()
        await sender.open(timeout_s=5.0)
        sender.begin(self.tokens, 0, tuple(range(self._num_blocks)), lambda: None)
        if compute_s:
            ends = layer_group_ends(self.layout.num_layers, self.tokens * self.layout.token_bytes, self._group_bytes)
            await asyncio.to_thread(
                self._compute, sender, ends if streamed else (), compute_s, asyncio.get_running_loop()
            )
        ended_s = time.monotonic()
        sender.computed(self.tokens)
        try:
            await sender.finish(worker_pb2.SequenceState())
        finally:
            await sender.close()
        near_cpu_s = time.process_time() - began_cpu_s
        if not (line := self._told.readline()):
            raise TransferFailed("the other process ended")
        verdict = Verdict(*json.loads(line))
        far_cpu_s, self._far_cpu_s = verdict.cpu_s - self._far_cpu_s, verdict.cpu_s
        return Exposed(verdict.monotonic_s - ended_s, near_cpu_s, far_cpu_s)

    def _compute(
        self, sender: Sender, ends: Sequence[int], compute_s: float, event_loop: asyncio.AbstractEventLoop
    ) -> None:
        """In a thread, as the engine does."""
        for layer in range(1, self.layout.num_layers + 1):
            time.sleep(compute_s / self.layout.num_layers)
            if layer in ends:
                event_loop.call_soon_threadsafe(sender.reached, self.tokens, layer)

    def close(self) -> None:
        self._pool.shutdown()


async def _no_stage(ranks: Sequence[CoreRank], block_ids: Sequence[int], layers: range) -> None:
    """The engine's memory is what the transport reads."""


@contextlib.contextmanager
def other_process(options: argparse.Namespace) -> Iterator[tuple[Where, IO[str]]]:
    """And what it prints."""
    shape = {"transport": options.transport, "tokens": options.tokens, "layers": options.layers}
    shape["kv-heads"] = options.kv_heads
    flags = [f"--{name}={value}" for name, value in shape.items()]
    command = [sys.executable, "-m", "bench.streaming_target", *flags]
    far = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert far.stdin is not None
    assert far.stdout is not None
    try:
        yield Where(*json.loads(far.stdout.readline())), far.stdout
    finally:
        far.stdin.close()
        far.wait()


async def measure(options: argparse.Namespace, where: Where, told: IO[str]) -> dict[str, list[Exposed]]:
    """By variant, a hand-over each round."""
    near = TRANSPORTS[options.transport]()
    try:
        pair = Pair(options, near, where, told)
        async with channel(where.address, CLUSTER_KEY) as link:
            measured = await take_turns(pair, worker_pb2_grpc.WorkerStub(link), options)
        pair.close()
        return measured
    finally:
        near.close()


async def take_turns(
    pair: Pair, stub: worker_pb2_grpc.WorkerStub, options: argparse.Namespace
) -> dict[str, list[Exposed]]:
    for _ in range(5):  # caches and branch predictors are as they will be
        alone = await pair.hand_over(stub, share=1.0, compute_s=0.0, streamed=False)
    compute_s = options.compute * alone.seconds
    found: dict[str, list[Exposed]] = {}
    for _ in range(options.rounds):
        for kind in (SERIAL, STREAMED, FULL_RATE):
            for digests, share in SHARES.items():
                pause_s = 0.0 if kind is FULL_RATE else compute_s
                exposed = await pair.hand_over(stub, share=share, compute_s=pause_s, streamed=kind is STREAMED)
                found.setdefault(f"{kind}, {digests}", []).append(exposed)
    return found


def report(measured: dict[str, list[Exposed]], options: argparse.Namespace) -> None:
    nbytes = options.tokens * layout_of(options).token_bytes
    medians = {name: statistics.median(each.seconds for each in found) for name, found in measured.items()}
    low, _, high = statistics.quantiles((each.seconds for each in measured[f"{SERIAL}, digests always"]), n=4)
    spread = (high - low) / medians[f"{SERIAL}, digests always"]
    table = Table(title=f"{nbytes / 2**20:.0f} MiB over {options.transport}, median of {options.rounds} rounds")
    for title in ("", "exposed, ms", "of serial", "GB/s", "CPU ms: sender", "receiver"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, seconds in medians.items():
        serial = medians[f"{SERIAL}, {name.partition(', ')[2]}"]
        near, far = (statistics.median(each[index] for each in measured[name]) * 1e3 for index in (1, 2))
        rate = f"{nbytes / seconds / 1e9:.2f}"
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / serial:.1%}", rate, f"{near:.1f}", f"{far:.1f}")
    Console().print(table)
    pairs = zip(*(measured[f"{FULL_RATE}, {digests}"] for digests in SHARES), strict=True)
    costs = sorted(with_digests.seconds / without.seconds - 1 for with_digests, without in pairs)
    cost, steady = statistics.median(costs), spread <= STEADY
    print(f"digests add {cost:.0%} ({costs[0]:.0%} to {costs[-1]:.0%}) to a hand-over at full rate")
    print(f"the serial time moved by {spread:.0%}: " + ("a steady run" if steady else "throw this run away"))
    results = {name: round(seconds, 6) for name, seconds in medians.items()}
    append_line(options.results, "streaming", options, results, steady=steady, digest_cost=round(cost, 3))


def main() -> None:
    options = parse_arguments()
    with other_process(options) as (where, told):
        settle_in(0)
        measured = uvloop.run(measure(options, where, told))
    report(measured, options)


if __name__ == "__main__":
    main()
