"""What of a hand-over a client waits for when blocks leave layer group by layer group, and what its digests cost.

One chunk goes from a worker's KV memory to another's through worker/departures.py over a real transport, and is
digested on both sides as production does it. Its computation is a pause before each layer, as on a device that leaves
the host alone; all layers together take `--compute` times what the transfer takes by itself. Exposed is the time from
the end of the last layer until the receiver has found the digests right.

    serial      nothing leaves before the step has ended: all of the transfer is exposed
    streamed    layers leave in groups while the next ones are computed
    full rate   nothing is computed: digests always and off, one after the other

Variants take turns in one run; figures are medians over the rounds, shares are of the serial time of the same run. A
run is thrown away when the serial time moved by more than 15 % (quartiles) between rounds: the machine was not quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.record import append_line
from engine.kv_memory import TORCH_DTYPES
from kernels.cpu.copy_grid import shared_copy
from kernels.cpu.row_digest import shared_row_sums
from kvtransfer.digest import DigestPolicy
from kvtransfer.layer_groups import layer_group_ends
from kvtransfer.plan import RankKV
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Peer, Region, Transport
from kvtransfer.ucx import UcxTransport
from legato.v1 import worker_pb2
from spec.dtype import Dtype
from spec.errors import LegatoError
from spec.layout import KVLayout
from worker.core import CoreRank
from worker.departures import Departures, Target
from worker.kv_region import landing_of
from worker.landing import LandingCheck
from worker.link import Link
from worker.staging import SourceKV, Staging

EXAMPLES = """examples:
  python -m bench.streaming                          half a minute
  python -m bench.streaming --transport sockets --compute 2
"""
STEADY = 0.15
TRANSPORTS: dict[str, type[Transport]] = {"ucx": UcxTransport, "sockets": SocketsTransport}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.streaming",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--transport", choices=TRANSPORTS, default="ucx", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of the chunk (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, help="of 128 bfloat16 elements (default: %(default)s)")
    parser.add_argument("--group-mib", type=float, default=1.0, help="handoff.layer_group_bytes (default: %(default)s)")
    parser.add_argument("--compute", type=float, default=1.5, help="times the transfer (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="of all variants (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/streaming.jsonl"), help="gets one JSON line more")
    return parser.parse_args()


class Pair:
    """Two workers of one rank each, in this process."""

    def __init__(self, options: argparse.Namespace, near: Transport, far: Transport) -> None:
        self.layout = KVLayout(options.layers, options.kv_heads, 128, 16, Dtype.BFLOAT16)
        self.tokens, self.group_bytes = options.tokens, int(options.group_mib * 2**20)
        self.num_blocks = self.layout.blocks_for(options.tokens)
        self.pool = concurrent.futures.ThreadPoolExecutor(2)
        self.source, self.ranks = self._registered(near)
        self.landed, self.landed_ranks = self._registered(far)
        self.ranks[0].landing.view(torch.int16).random_()
        self.register, self.link = near.register, Link()
        self.peer: Peer = near.connect(far.address, self.landed.descriptor)
        self.blocks = torch.randperm(self.num_blocks).tolist()

    def _registered(self, transport: Transport) -> tuple[Region, list[CoreRank]]:
        region = transport.register(self.num_blocks * self.layout.block_bytes)
        landing = landing_of(region.buffer, self.layout, self.num_blocks)
        assert landing.dtype is TORCH_DTYPES[self.layout.dtype]
        return region, [CoreRank(RankKV.whole(self.layout), landing=landing)]

    async def hand_over(self, *, share: float, compute_s: float, streamed: bool) -> float:
        """Seconds from the end of the last layer to the receiver's verdict. Raises what went wrong."""
        failed: asyncio.Future[LegatoError] = asyncio.get_running_loop().create_future()
        told: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        check = LandingCheck(self.landed_ranks, self.pool, self.blocks, 0, self.tokens)

        async def tell(message: worker_pb2.HandoffRequest) -> None:
            heard.put_nowait(message)

        async def receive() -> None:
            """Beside the sender, as the other worker's event loop is."""
            while (message := await heard.get()).HasField("landed"):
                await check.take(message.landed.end_layer)
            if share:
                await check.compare(message.chunk.digests)
            told.set_result(time.perf_counter())

        heard: asyncio.Queue[worker_pb2.HandoffRequest] = asyncio.Queue()
        receiving = asyncio.create_task(receive())
        ticket = worker_pb2.Ticket(
            reservation_id="r", num_tokens=self.tokens, block_ids=self.blocks, expires_unix_ns=time.time_ns() + 10**11
        )
        target_ranks = tuple(self.landed_ranks)
        staging = Staging(
            SourceKV(lambda group: self.ranks, self.source, self.register, _no_stage), target_ranks, self.pool
        )
        target = Target(ticket, worker_pb2.SignedTicket(), target_ranks, self.peer, "", self.link, 5.0)
        departures = Departures(target, staging, DigestPolicy(share), self.pool, tell, failed)
        running = asyncio.create_task(departures.run())
        ends = layer_group_ends(self.layout.num_layers, self.tokens * self.layout.token_bytes, self.group_bytes)
        departures.begin(self.tokens, 0, tuple(range(self.num_blocks)), lambda: None)
        event_loop = asyncio.get_running_loop()

        def compute() -> None:
            for layer in range(self.layout.num_layers):
                time.sleep(compute_s / self.layout.num_layers)
                if streamed and layer + 1 in ends:
                    event_loop.call_soon_threadsafe(departures.reached, self.tokens, layer + 1)

        if compute_s:
            await asyncio.to_thread(compute)
        ended_s = time.perf_counter()
        departures.computed(self.tokens)
        departures.end()
        await running
        if failed.done():
            receiving.cancel()
            raise failed.result()
        await receiving
        return told.result() - ended_s


async def _no_stage(ranks: Sequence[CoreRank], block_ids: Sequence[int], layers: range) -> None:
    """The engine's memory is what the transport reads."""


@contextlib.contextmanager
def paired(options: argparse.Namespace) -> Iterator[Pair]:
    near, far = TRANSPORTS[options.transport](), TRANSPORTS[options.transport]()
    try:
        yield Pair(options, near, far)
    finally:
        near.close()
        far.close()


async def measure(pair: Pair, options: argparse.Namespace) -> dict[str, list[float]]:
    for _ in range(3):  # pages are touched
        alone_s = await pair.hand_over(share=1.0, compute_s=0.0, streamed=False)
    compute_s = options.compute * alone_s
    found: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, how in {
            "serial, digests always": {"share": 1.0, "compute_s": compute_s, "streamed": False},
            "streamed, digests always": {"share": 1.0, "compute_s": compute_s, "streamed": True},
            "serial, digests off": {"share": 0.0, "compute_s": compute_s, "streamed": False},
            "streamed, digests off": {"share": 0.0, "compute_s": compute_s, "streamed": True},
            "full rate, digests always": {"share": 1.0, "compute_s": 0.0, "streamed": False},
            "full rate, digests off": {"share": 0.0, "compute_s": 0.0, "streamed": False},
        }.items():
            found.setdefault(name, []).append(await pair.hand_over(**how))
    return found


def main() -> None:
    options = parse_arguments()
    torch.set_num_threads(1)
    shared_row_sums(), shared_copy()  # compiled where they must be
    with paired(options) as pair:
        measured = asyncio.run(measure(pair, options))
        nbytes = options.tokens * pair.layout.token_bytes
        pair.pool.shutdown()
    medians = {name: statistics.median(each) for name, each in measured.items()}
    low, _, high = statistics.quantiles(measured["serial, digests always"], n=4)
    spread = (high - low) / medians["serial, digests always"]
    table = Table(title=f"{nbytes / 2**20:.0f} MiB over {options.transport}, median of {options.rounds} rounds")
    for title in ("", "exposed, ms", "of the serial time", "GB/s"):
        table.add_column(title, justify="right" if title else "left")
    for name, seconds in medians.items():
        serial = medians[f"serial, {name.partition(', ')[2]}"]
        table.add_row(name, f"{seconds * 1e3:.2f}", f"{seconds / serial:.1%}", f"{nbytes / seconds / 1e9:.2f}")
    Console().print(table)
    cost = medians["full rate, digests always"] / medians["full rate, digests off"] - 1
    steady = spread <= STEADY
    print(f"digests add {cost:.0%} to a hand-over at full rate")
    print(f"the serial time moved by {spread:.0%}: " + ("a steady run" if steady else "throw this run away"))
    results = {name: round(seconds, 6) for name, seconds in medians.items()}
    append_line(options.results, "streaming", options, results, steady=steady, digest_cost=round(cost, 3))


if __name__ == "__main__":
    main()
