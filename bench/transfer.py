"""The transports between two processes, beside a plain memcpy and libucp's own ucx_perftest, interleaved in one run.

Each measurement moves the same bytes in pieces of one size, one transfer per piece, all posted at once. Figures are
medians over the rounds in GB/s, and ratios to the memcpy of the same run. A run is thrown away when the memcpy itself
moved by more than 15 % between rounds: the machine was not quiet.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kvtransfer.libucp import load
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Piece, Transport
from kvtransfer.ucx import UcxTransport
from legato.v1.transfer_pb2 import SocketsAddress
from spec.errors import TransportUnavailable

EXAMPLES = """examples:
  python -m bench.transfer                      about a minute
  python -m bench.transfer --rounds 9 --mib 128
"""
PIECE_BYTES = (64 << 10, 1 << 20, 16 << 20)
STEADY = 0.15
TCP_ONLY = {"TLS": "tcp,self"}
Measure = Callable[[int], float]  # piece size -> GB/s

KINDS: dict[str, Callable[[], Transport]] = {
    "ucx, shared memory": UcxTransport,
    "ucx, TCP": lambda: UcxTransport(options=TCP_ONLY),
    "sockets, Unix": SocketsTransport,
    "sockets, TCP": SocketsTransport,
}


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
        contenders |= stack.enter_context(perftest(options.mib << 20))
        measured: dict[str, dict[int, list[float]]] = {name: {size: [] for size in PIECE_BYTES} for name in contenders}
        for each in range(options.rounds + 1):
            for name, measure in contenders.items():
                for size in PIECE_BYTES:
                    rate = measure(size)
                    if each:  # the first touches the pages
                        measured[name][size].append(rate)
    report(measured, options)


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


def serve(name: str, nbytes: int) -> None:
    """The other process: owns a region until its standard input ends."""
    owner = KINDS[name]()
    region = owner.register(nbytes)
    print(json.dumps([owner.address.hex(), region.descriptor.hex()]), flush=True)
    sys.stdin.read()
    owner.close()


@contextlib.contextmanager
def transport(name: str, mib: int) -> Iterator[Measure]:
    near = KINDS[name]()
    command = [sys.executable, "-m", "bench.transfer", "--serve", name, "--mib", str(mib)]
    far = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert far.stdin is not None
    assert far.stdout is not None
    address, descriptor = map(bytes.fromhex, json.loads(far.stdout.readline()))
    if name == "sockets, TCP":
        where = SocketsAddress.FromString(address)
        where.unix_path = ""
        address = where.SerializeToString()
    nbytes = mib << 20
    source, peer = near.register(nbytes), near.connect(address, descriptor)
    source.buffer[:] = os.urandom(1 << 20) * mib

    def measure(size: int) -> float:
        started = time.perf_counter()
        for transfer in [peer.post(source, [Piece(at, at, size)]) for at in range(0, nbytes, size)]:
            transfer.result(60)
        return nbytes / (time.perf_counter() - started) / 1e9

    try:
        yield measure
    finally:
        near.close()
        far.stdin.close()
        far.wait()


def memcpy(nbytes: int) -> Measure:
    source, target = bytearray(os.urandom(1 << 20) * (nbytes >> 20)), bytearray(nbytes)
    source_at, target_at = (ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in (source, target))

    def measure(size: int, held: tuple[bytearray, bytearray] = (source, target)) -> float:
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
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(
        [program, "-p", port], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(0.5)
        command = [program, "127.0.0.1", "-p", port, "-t", "ucp_put_bw", "-s", str(size), "-n", str(count), "-f"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return 0.0
    finally:
        server.kill()
        server.wait()
    final = re.findall(r"^(?:Final:)?\s*(\d+(?:\s+[\d.]+){7})\s*$", done.stdout, re.MULTILINE)
    return float(final[-1].split()[4]) * (1 << 20) / 1e9 if final else 0.0


def report(measured: dict[str, dict[int, list[float]]], options: argparse.Namespace) -> None:
    medians = {name: {size: statistics.median(rates) for size, rates in by.items()} for name, by in measured.items()}
    spread = max((max(rates) - min(rates)) / statistics.median(rates) for rates in measured["memcpy"].values())
    table = Table(title=f"GB/s (ratio to memcpy), {options.mib} MiB in pieces, median of {options.rounds} rounds")
    table.add_column("")
    for size in PIECE_BYTES:
        table.add_column(f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB", justify="right")
    for name, by in medians.items():
        table.add_row(name, *(f"{by[size]:6.2f}  ({by[size] / medians['memcpy'][size]:.2f})" for size in PIECE_BYTES))
    Console().print(table)
    steady = spread <= STEADY
    print(f"memcpy moved by {spread:.0%} between rounds: " + ("a steady run" if steady else "throw this run away"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    line = {
        "bench": "transfer",
        "commit": commit.stdout.strip(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"system": platform.platform(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "libucp": load().version},
        "rounds": options.rounds,
        "mib": options.mib,
        "steady": steady,
        "gb_per_s": {name: {str(size): round(rate, 3) for size, rate in by.items()} for name, by in medians.items()},
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    with options.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
