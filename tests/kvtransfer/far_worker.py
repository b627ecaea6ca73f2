"""A worker for the conformance suite: one transport, driven by JSON lines, so that it can be another process.

python far_worker.py NAME      reads {"verb": ...} from standard input, answers {"result": ...} or {"error": ...}
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading

from kvtransfer.transport import Peer, Piece, Region, Transport
from spec.errors import LegatoError


def open_transport(name: str) -> Transport:
    if name == "memory":
        from kvtransfer.memory import MemoryTransport

        return MemoryTransport()
    if name.startswith("sockets"):
        from kvtransfer.sockets import SocketsTransport

        return SocketsTransport()
    from kvtransfer.ucx import UcxTransport

    return UcxTransport(options={"TLS": "tcp,self"} if name == "ucx-tcp" else {})


class FarWorker:
    def __init__(self, name: str) -> None:
        self.name = name
        self.transport = open_transport(name)
        self.regions: list[Region] = []
        self.peers: list[Peer] = []
        self.burning = False

    def start_afresh(self) -> dict[str, int]:
        """Closes the transport and opens another. The counts of the old one."""
        self.transport.close()
        counts = self.transport.counts()
        if self.name != "memory":
            self.__init__(self.name)  # type: ignore[misc]
        return counts

    def address(self) -> str:
        return self.transport.address.hex()

    def register(self, nbytes: int, given: bool = False) -> str:
        memory = memoryview(bytearray(nbytes)) if given else None
        self.regions.append(self.transport.register(nbytes, memory))
        return self.regions[-1].descriptor.hex()

    def read(self, offset: int, nbytes: int, region: int = -1) -> str:
        return self.regions[region].buffer[offset : offset + nbytes].hex()

    def digest(self, region: int = -1) -> str:
        return hashlib.blake2b(self.regions[region].buffer).hexdigest()

    def release(self, region: int = -1) -> None:
        self.regions[region].release()

    def connect(self, address: str, descriptor: str) -> None:
        self.peers.append(self.transport.connect(bytes.fromhex(address), bytes.fromhex(descriptor)))

    def release_peer(self) -> None:
        self.peers[-1].release()

    def link_id(self) -> int:
        return self.peers[-1].link_id

    def connected(self) -> bool:
        return self.peers[-1].connected

    def fill(self, value: int) -> None:
        buffer = self.regions[-1].buffer
        buffer[:] = bytes([value]) * buffer.nbytes

    def post_noise(self, nbytes: int, seed: int) -> None:
        self.regions[-1].buffer[:nbytes] = random.Random(seed).randbytes(nbytes)
        self.peers[-1].post(self.regions[-1], [Piece(0, 0, nbytes)]).result(20)

    def write_for_ever(self, nbytes: int) -> None:
        """Posts the same write again and again, in a thread of its own, until it fails."""
        if not any(self.regions[-1].buffer[-1:]):
            self.fill(0xC3)

        def run() -> None:
            try:
                while True:
                    self.peers[-1].post(self.regions[-1], [Piece(0, 0, nbytes)]).result()
            except LegatoError:
                return

        threading.Thread(target=run, daemon=True).start()

    def burn(self, on: bool) -> None:
        """Keeps a core and the interpreter lock busy, as an engine would."""
        self.burning = on

        def run() -> None:
            while self.burning:
                sum(range(1000))

        if on:
            threading.Thread(target=run, daemon=True).start()

    def counts(self) -> dict[str, int]:
        return self.transport.counts()

    def close(self) -> None:
        self.transport.close()


def main() -> None:
    worker = FarWorker(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": getattr(worker, request.pop("verb"))(**request)}
        except LegatoError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
