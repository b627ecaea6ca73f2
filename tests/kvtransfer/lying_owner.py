"""An owner whose libucp region is not what it says, and a writer of its own that writes into it, as two processes.

python lying_owner.py own FIELD VALUE SEALED     prints address and descriptor; on a line of input: two digests
python lying_owner.py write ADDRESS DESCRIPTOR   prints "landed by copy" or "by message", or the TransferFailed
"""

from __future__ import annotations

import hashlib
import random
import sys

from kvtransfer import ucx_key
from kvtransfer.transport import Piece
from kvtransfer.ucx import UcxTransport
from kvtransfer.ucx_worker import Endpoint
from legato.v1.transfer_pb2 import TransferFrame
from spec.errors import TransferFailed

NBYTES = 300_007
NOISE = random.Random(5).randbytes(NBYTES)


def own(field: str, value: str, sealed: str) -> None:
    transport = UcxTransport()
    region, other = transport.register(NBYTES), transport.register(NBYTES)
    send = transport._worker.send
    lies = {"empty": b"", "half": region.remote_key[: len(region.remote_key) // 2], "other": other.base}  # type: ignore[attr-defined]

    def send_a_lie(endpoint: Endpoint, frame: TransferFrame) -> None:
        if frame.HasField("attached"):
            lie = lies[value] if value in lies else getattr(frame.attached, field) + int(value)
            setattr(frame.attached, field, lie)
            if sealed == "sealed":
                ucx_key.seal(frame.attached)
        send(endpoint, frame)

    transport._worker.send = send_a_lie  # type: ignore[method-assign]
    print(transport.address.hex(), region.descriptor.hex(), flush=True)
    for _ in sys.stdin:
        print(*(hashlib.blake2b(each.buffer).hexdigest() for each in (region, other)), flush=True)
    transport.close()


def write(address: str, descriptor: str) -> None:
    transport = UcxTransport()
    try:
        peer = transport.connect(bytes.fromhex(address), bytes.fromhex(descriptor))
        source = transport.register(NBYTES)
        source.buffer[:] = NOISE
        peer.post(source, [Piece(0, 0, NBYTES)]).result(10)
        print("landed by", "copy" if peer._mapped_base else "message")  # type: ignore[attr-defined]
    except TransferFailed as error:
        print(error)
    transport.close()


if __name__ == "__main__":
    {"own": own, "write": write}[sys.argv[1]](*sys.argv[2:])
