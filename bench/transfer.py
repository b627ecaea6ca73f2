"""The transports between two processes, beside a memcpy, a raw tuned socket and libucp's own ucx_perftest.

A measurement moves the same bytes as one transfer, in pieces of one size; the smallest size is a plan between unlike
layouts (one KV head of one block each, from eight ranks to one). Contenders take turns, and a ratio is one of the same
round; figures are medians over rounds. A run is thrown away when the memcpy itself moved by more than 15 % between
rounds: the machine was not quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.record import append_line
from kvtransfer.frames import tune
from kvtransfer.libucp import load
from kvtransfer.plan import RankKV
from kvtransfer.routes import HandoffPlan, RankMemory
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Piece, Transport
from kvtransfer.ucx import UcxTransport
from legato.v1.transfer_pb2 import SocketsAddress
from spec.dtype import Dtype
from spec.errors import TransportUnavailable
from spec.layout import KVLayout

EXAMPLES = """examples:
  python -m bench.transfer                      about a minute and a half
  python -m bench.transfer --rounds 9 --mib 128
"""
GATHERED = 4 << 10  # a head's run in a block of 16 tokens of 128 elements of two bytes
PIECE_BYTES = (GATHERED, 64 << 10, 1 << 20, 16 << 20)
STEADY = 0.15
TCP_ONLY = {"TLS": "tcp,self"}
RAW = {"raw socket, TCP": socket.AF_INET, "raw socket, Unix": socket.AF_UNIX}
RAW_BYTES = 4 << 20  # of one system call
Measure = Callable[[int], float]  # piece size -> GB/s; 0: not measured

KINDS: dict[str, Callable[[], Transport]] = {
    "ucx, shared memory": UcxTransport,
    "ucx, TCP": lambda: UcxTransport(options=TCP_ONLY),
    "sockets, Unix": SocketsTransport,
    "sockets, TCP": SocketsTransport,
}


class Target(NamedTuple):
    what: str
    ours: tuple[str, int]  # contender, piece size
    theirs: tuple[str, int]
    at_least: float


WHOLE = PIECE_BYTES[-1]
TARGETS = [
    Target("shared memory, 1 MiB / memcpy", ("ucx, shared memory", 1 << 20), ("memcpy", 1 << 20), 0.8),
    Target("shared memory, 16 MiB / memcpy", ("ucx, shared memory", WHOLE), ("memcpy", WHOLE), 0.8),
    Target("shared memory, 64 KiB / memcpy", ("ucx, shared memory", 64 << 10), ("memcpy", 64 << 10), 0.6),
    Target("TCP, 16 MiB / raw socket", ("sockets, TCP", WHOLE), ("raw socket, TCP", WHOLE), 0.85),
    Target("TCP, 64 KiB / raw socket", ("sockets, TCP", 64 << 10), ("raw socket, TCP", WHOLE), 0.6),
    Target("Unix socket, 16 MiB / raw socket", ("sockets, Unix", WHOLE), ("raw socket, Unix", WHOLE), 0.85),
    *(Target(f"{name}, gathered / contiguous", (name, GATHERED), (name, WHOLE), 0.7) for name in KINDS),
]


def main() -> None:
    options = parse_arguments()
    if options.serve:
        serve(options.serve, options.mib << 20)
        return
    with contextlib.ExitStack() as stack:
        contenders: dict[str, Measure] = {"memcpy": memcpy(options.mib << 20)}
        for name in KINDS:
            with contextlib.suppress(TransportUnavailable):
                contenders[name] = stack.enter_context(transport(name, options.mib))
        for name in RAW:
            contenders[name] = stack.enter_context(raw_socket(name, options.mib))
        contenders |= stack.enter_context(perftest(options.mib << 20))
        measured: dict[str, dict[int, list[float]]] = {name: {size: [] for size in PIECE_BYTES} for name in contenders}
        for each in range(options.rounds + 1):
            for size in PIECE_BYTES:
                for name, measure in contenders.items():
                    rate = measure(size)
                    if each:  # the first touches the pages
                        measured[name][size].append(rate)
    report(measured, plan_ms(), options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.transfer",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="of all contenders (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=64, help="moved by one measurement (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("results/transfer.jsonl"), help="gets one JSON line more")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


def ranks(tp: int, num_layers: int, num_blocks: int) -> list[RankMemory]:
    """Eight KV heads of 128 elements of bfloat16 cut among them, one behind the other."""
    made, offset = [], 0
    for index in range(tp):
        heads = range(index * 8 // tp, (index + 1) * 8 // tp)
        layout = KVLayout(num_layers, len(heads), 128, 16, Dtype.BFLOAT16)
        made.append(RankMemory(RankKV(layout, range(num_layers), heads), 0, offset))
        offset += num_blocks * layout.block_bytes
    return made


def pieces_of(size: int, nbytes: int) -> Sequence[Piece]:
    if size != GATHERED:
        return [Piece(at, at, size) for at in range(0, nbytes, size)]
    num_blocks = nbytes >> 20  # of 16 layers: a MiB each
    source, target = (ranks(tp, 16, num_blocks) for tp in (8, 1))
    return HandoffPlan(source, range(num_blocks), target, range(num_blocks), 0, 16 * num_blocks).of()


def plan_ms() -> float:
    """tp8 to one rank, 80 layers, 32,768 tokens; the best of five."""
    source, target = (ranks(tp, 80, 2048) for tp in (8, 1))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        HandoffPlan(source, range(2048), target, range(2048), 0, 32_768).of()
        times.append(time.perf_counter() - started)
    return min(times) * 1e3


# ---- contenders ------------------------------------------------------------------------------------------------------


def serve(name: str, nbytes: int) -> None:
    """The other process: owns a region until its standard input ends."""
    if name in RAW:
        receive_raw(RAW[name], nbytes)
        return
    owner = KINDS[name]()
    region = owner.register(nbytes)
    print(json.dumps([owner.address.hex(), region.descriptor.hex()]), flush=True)
    sys.stdin.read()
    owner.close()


@contextlib.contextmanager
def other_process(name: str, mib: int) -> Iterator[str]:
    """The first line that it prints."""
    command = [sys.executable, "-m", "bench.transfer", "--serve", name, "--mib", str(mib)]
    far = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert far.stdin is not None
    assert far.stdout is not None
    try:
        yield far.stdout.readline()
    finally:
        far.stdin.close()
        far.wait()


@contextlib.contextmanager
def transport(name: str, mib: int) -> Iterator[Measure]:
    near = KINDS[name]()
    with other_process(name, mib) as line:
        address, descriptor = map(bytes.fromhex, json.loads(line))
        if name == "sockets, TCP":
            where = SocketsAddress.FromString(address)
            where.unix_path = ""
            address = where.SerializeToString()
        nbytes = mib << 20
        source, peer = near.register(nbytes), near.connect(address, descriptor)
        source.buffer[:] = os.urandom(1 << 20) * mib

        def measure(size: int) -> float:
            pieces = pieces_of(size, nbytes)
            started = time.perf_counter()
            peer.post(source, pieces).result(60)
            return nbytes / (time.perf_counter() - started) / 1e9

        try:
            yield measure
        finally:
            near.close()


def receive_raw(family: int, nbytes: int) -> None:
    """As fast as a socket takes it: into one buffer, one byte back for each `nbytes`."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(family) as server:
        server.bind(f"{folder}/raw" if family == socket.AF_UNIX else ("127.0.0.1", 0))
        server.listen()
        print(json.dumps(server.getsockname()), flush=True)
        link, buffer = server.accept()[0], memoryview(bytearray(nbytes))
        tune(link)
        while True:
            left = buffer
            while left and (got_bytes := link.recv_into(left)):
                left = left[got_bytes:]
            if left:
                return
            link.sendall(b"!")


@contextlib.contextmanager
def raw_socket(name: str, mib: int) -> Iterator[Measure]:
    payload = memoryview(os.urandom(1 << 20) * mib)
    with other_process(name, mib) as line, socket.socket(RAW[name]) as link:
        where = json.loads(line)
        link.connect(where if isinstance(where, str) else tuple(where))
        tune(link)

        def measure(size: int) -> float:
            if size != WHOLE:
                return 0.0
            started = time.perf_counter()
            for at in range(0, payload.nbytes, RAW_BYTES):
                link.sendall(payload[at : at + RAW_BYTES])
            assert link.recv(1) == b"!"
            return payload.nbytes / (time.perf_counter() - started) / 1e9

        yield measure


def memcpy(nbytes: int) -> Measure:
    source, target = bytearray(os.urandom(1 << 20) * (nbytes >> 20)), bytearray(nbytes)
    source_at, target_at = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (source, target))

    def measure(size: int, held: tuple[bytearray, bytearray] = (source, target)) -> float:
        size = max(size, 64 << 10)  # below, it is Python that takes the time
        started = time.perf_counter()
        for at in range(0, nbytes, size):
            ctypes.memmove(target_at + at, source_at + at, size)
        return nbytes / (time.perf_counter() - started) / 1e9

    return measure


@contextlib.contextmanager
def perftest(nbytes: int) -> Iterator[dict[str, Measure]]:
    """ucx_perftest of the wheel, a put bandwidth test over each kind of transport; nothing where there is none."""
    found = importlib.util.find_spec("libucx")
    original = Path(found.origin).parent / "bin/ucx_perftest" if found and found.origin else None
    if original is None or not original.exists():
        yield {}
        return
    wheel = original.parent.parent
    libraries = [wheel / "lib", *wheel.parent.glob("libucx_cu*.libs")]
    environment = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "UCX_NET_DEVICES": "lo"}
    environment |= {"UCX_TCP_TX_SEG_SIZE": "128k", "UCX_TCP_RX_SEG_SIZE": "128k"}
    with tempfile.TemporaryDirectory() as folder:
        program = shutil.copy(original, folder)
        os.chmod(program, 0o755)  # the wheel forgets it

        def measure_over(transports: str) -> Measure:
            return lambda size: run_perftest(program, environment | {"UCX_TLS": transports}, size, nbytes // size)

        yield {
            "ucx_perftest put, shared memory": measure_over("tcp,sm,self"),
            "ucx_perftest put, TCP": measure_over("tcp,self"),
        }


def run_perftest(program: str, environment: dict[str, str], size: int, count: int) -> float:
    """Average bandwidth in GB/s; 0 when it did not finish in time (it busy-polls, and starves on a loaded machine)."""
    if size not in (1 << 20, WHOLE):
        return 0.0
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        [program, "-p", port], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(0.3)
        command = [program, "127.0.0.1", "-p", port, "-t", "ucp_put_bw", "-s", str(size), "-n", str(count), "-f"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return 0.0
    finally:
        server.kill()
        server.wait()
    final = re.findall(r"^(?:Final:)?\s*(\d+(?:\s+[\d.]+){7})\s*$", done.stdout, re.MULTILINE)
    return float(final[-1].split()[4]) * (1 << 20) / 1e9 if final else 0.0


# ---- what is said ----------------------------------------------------------------------------------------------------


def report(measured: dict[str, dict[int, list[float]]], planned_ms: float, options: argparse.Namespace) -> None:
    medians = {name: {size: statistics.median(rates) for size, rates in by.items()} for name, by in measured.items()}
    spread = max((max(rates) - min(rates)) / statistics.median(rates) for rates in measured["memcpy"].values())
    rates = Table(title=f"GB/s, {options.mib} MiB as one transfer in pieces, median of {options.rounds} rounds")
    rates.add_column("")
    for size in PIECE_BYTES:
        rates.add_column(f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB", justify="right")
    for name, by in medians.items():
        rates.add_row(name, *(f"{by[size]:.2f}" if by[size] else "" for size in PIECE_BYTES))
    ratios = Table(title="of the same round, median (smallest to largest)")
    for column in ("", "ratio", "", "target"):
        ratios.add_column(column, justify="left" if not column else "right")
    found = {target.what: ratios_of(measured, target) for target in TARGETS}
    for target in TARGETS:
        if each := found[target.what]:
            median = statistics.median(each)
            met = "" if median >= target.at_least else "missed"
            ratios.add_row(
                target.what, f"{median:.2f}", f"{min(each):.2f} to {max(each):.2f}", f"{target.at_least} {met}"
            )
    met = "" if planned_ms < 5 else "missed"
    ratios.add_row("plan, 32,768 tokens, 80 layers, tp8 to tp1", f"{planned_ms:.1f} ms", "", f"5 ms {met}")
    console = Console()
    console.print(rates)
    console.print(ratios)
    steady = spread <= STEADY
    print(f"memcpy moved by {spread:.0%} between rounds: " + ("a steady run" if steady else "throw this run away"))
    results = {
        "gb_per_s": {name: {str(size): round(rate, 3) for size, rate in by.items()} for name, by in medians.items()},
        "ratios": {what: [round(ratio, 3) for ratio in each] for what, each in found.items()},
        "plan_ms": round(planned_ms, 2),
    }
    append_line(options.results, "transfer", options, results, steady=steady, libucp=load().version)


def ratios_of(measured: dict[str, dict[int, list[float]]], target: Target) -> list[float]:
    ours, theirs = (measured.get(name, {}).get(size, []) for name, size in (target.ours, target.theirs))
    return [a / b for a, b in zip(ours, theirs, strict=False) if a and b]


if __name__ == "__main__":
    main()
