"""Who moves bytes in bench.transfer: our transports to another process, a raw socket, memcpy, ucx_perftest.

python -m bench.transfer_contenders NAME MIB      the other process: owns that contender's memory until its input ends
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from kvtransfer.frames import tune
from kvtransfer.plan import RankKV
from kvtransfer.routes import HandoffPlan, RankMemory
from kvtransfer.sockets import SocketsTransport
from kvtransfer.transport import Piece, Transport
from kvtransfer.ucx import UcxTransport
from legato.v1.transfer_pb2 import SocketsAddress
from spec.dtype import Dtype
from spec.errors import TransportUnavailable
from spec.layout import KVLayout

GATHERED = 4 << 10  # a head's run in a block of 16 tokens of 128 elements of two bytes
WHOLE = 16 << 20
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


@contextlib.contextmanager
def contenders(mib: int) -> Iterator[dict[str, Measure]]:
    """Those that this machine has, by name."""
    with contextlib.ExitStack() as stack:
        found: dict[str, Measure] = {"memcpy": memcpy(mib << 20)}
        for name in KINDS:
            with contextlib.suppress(TransportUnavailable):
                found[name] = stack.enter_context(transport(name, mib))
        for name in RAW:
            found[name] = stack.enter_context(raw_socket(name, mib))
        yield found | stack.enter_context(perftest(mib << 20))


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
    command = [sys.executable, "-m", "bench.transfer_contenders", name, str(mib)]
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


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]) << 20)
