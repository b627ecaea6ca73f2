"""The receiving end of bench.streaming: KV memory in a process of its own, and the stream by which it is told.

What lands is digested by worker/landing.py, as a worker's receiver does it. Where to reach it is the first line that it
prints; each hand-over adds one, when it is found right.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import torch

from engine.kv_memory import TORCH_DTYPES
from kernels.cpu.copy_grid import shared_copy
from kernels.cpu.row_digest import shared_row_sums
from kvtransfer.plan import RankKV
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Region, Transport
from kvtransfer.ucx import UcxTransport
from legato.v1 import worker_pb2, worker_pb2_grpc
from service.host import Host
from service.run import run_service
from spec.dtype import Dtype
from spec.layout import KVLayout
from worker.core import CoreRank
from worker.kv_region import landing_of
from worker.landing import LandingCheck
from worker.receiver import Reply, Request

CLUSTER_KEY = "of a bench"
TRANSPORTS: dict[str, type[Transport]] = {"ucx": UcxTransport, "sockets": SocketsTransport}


class Where(NamedTuple):
    """What the sender needs of it, as JSON."""

    address: str
    transport_address_hex: str
    descriptor_hex: str


class Verdict(NamedTuple):
    """One hand-over is found right, as JSON."""

    monotonic_s: float  # a clock that all processes of a host share
    cpu_s: float  # of the process, so far


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--transport", choices=TRANSPORTS, default="ucx", help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="of the chunk (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--kv-heads", type=int, default=8, help="of 128 bfloat16 elements (default: %(default)s)")


def layout_of(options: argparse.Namespace) -> KVLayout:
    return KVLayout(options.layers, options.kv_heads, 128, 16, Dtype.BFLOAT16)


def registered(transport: Transport, layout: KVLayout, num_tokens: int) -> tuple[Region, list[CoreRank]]:
    """KV memory of one rank that holds so many tokens; its pages are touched."""
    num_blocks = layout.blocks_for(num_tokens)
    region = transport.register(num_blocks * layout.block_bytes)
    landing = landing_of(region.buffer, layout, num_blocks)
    assert landing.dtype is TORCH_DTYPES[layout.dtype]
    landing.view(torch.int16).random_()
    return region, [CoreRank(RankKV.whole(layout), landing=landing)]


def settle_in(number: int) -> None:
    """One of the two ends: its own half of the cores, its own compiled code, one thread a product."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    if half:
        os.sched_setaffinity(0, cores[half * number : half * (number + 1)])
    torch.set_num_threads(1)
    shared_row_sums(), shared_copy()


class Target(worker_pb2_grpc.WorkerServicer):
    """Of hand-overs one after the other."""

    def __init__(self, ranks: list[CoreRank]) -> None:
        self._ranks = ranks
        self._pool = concurrent.futures.ThreadPoolExecutor(2)

    async def Handoff(self, request_iterator: AsyncIterator[Request], context: Any) -> AsyncIterator[Reply]:
        check: LandingCheck | None = None
        async for message in request_iterator:
            match message.WhichOneof("event"):
                case "begin":
                    ticket = worker_pb2.Ticket.FromString(message.begin.ticket.ticket)
                    check = LandingCheck(self._ranks, self._pool, tuple(ticket.block_ids), 0, ticket.num_tokens)
                    yield Reply(accepted=Reply.Accepted())
                case "landed":
                    assert check is not None
                    await check.take(message.landed.end_layer)
                case "chunk":
                    assert check is not None
                    if message.chunk.digests:
                        await check.compare(message.chunk.digests)
                    print(json.dumps(Verdict(time.monotonic(), time.process_time())), flush=True)
                case "final":
                    yield Reply(admitted=Reply.Admitted())


async def serve(options: argparse.Namespace, stop: asyncio.Event) -> None:
    transport = TRANSPORTS[options.transport]()
    try:
        region, ranks = registered(transport, layout_of(options), options.tokens)
        async with Host("127.0.0.1", 0, internal_key=CLUSTER_KEY) as host:
            host.add(worker_pb2_grpc.add_WorkerServicer_to_server, Target(ranks), "legato.v1.Worker", internal=True)
            where = Where(host.address, transport.address.hex(), region.descriptor.hex())
            print(json.dumps(where), flush=True)
            await stop.wait()
    finally:
        transport.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.streaming_target", description=__doc__)
    add_shape_arguments(parser)
    given = parser.parse_args()
    settle_in(1)
    sys.exit(run_service(lambda stop: serve(given, stop), exit_with_stdin=True))
