"""Frames on a connected socket, for kvtransfer/sockets.py.

A frame is a 4-byte little-endian length and a TransferFrame of protos/legato/v1/transfer.proto.
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

from google.protobuf.message import DecodeError

from kvtransfer.transport import QUIET_TIMEOUT_S
from legato.v1.transfer_pb2 import SocketsAddress, TransferFrame
from spec.errors import TransferFailed

FRAME_LIMIT_BYTES = 1 << 20
SOCKET_BUFFER_BYTES = 4 << 20
BYTES_FOLLOW = getattr(socket, "MSG_MORE", 0)  # a flag of sending: no packet for this alone


def listen(host: str) -> socket.socket:
    """At a port that the system picks, by IPv4 where the host has both. Raises OSError, or ValueError for no name."""
    found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return socket.create_server(address, family=family, backlog=128)


def spelled(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def dial(where: SocketsAddress, timeout_s: float) -> socket.socket:
    """Raises OSError when none answers; ValueError or OverflowError for a name or port that cannot be."""
    if where.unix_path and where.host_id == host_id():
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(timeout_s)
        try:
            link.connect(unix_name(where.unix_path))
            tune(link)
            return link
        except (OSError, ValueError):  # another container of this host: it has its own names
            link.close()
    link = socket.create_connection((where.tcp_host, where.tcp_port), timeout=timeout_s)
    tune(link)
    return link


def tune(link: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        link.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
    if link.family in (socket.AF_INET, socket.AF_INET6):
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # a host that is gone is noticed as soon as one that does not answer
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(QUIET_TIMEOUT_S * 1000))
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)


def unix_name(path: str) -> str:
    return "\0" + path[1:] if path.startswith("@") else path


def host_id() -> str:
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    return boot_id.read_text().strip() if boot_id.exists() else f"{uuid.getnode():012x}"


def send_frame(link: socket.socket, frame: TransferFrame, flags: int = 0) -> None:
    encoded = frame.SerializeToString()
    link.sendall(len(encoded).to_bytes(4, "little") + encoded, flags)


def receive_frame(link: socket.socket, until_s: float | None = None) -> TransferFrame | None:
    """None when the other side ended the link between two frames. Raises TransferFailed for what is no frame, and for
    one that is not whole at `until_s` of time.monotonic()."""
    header = _receive_exactly(link, 4, until_s)
    if not header:
        return None
    size_bytes = int.from_bytes(header, "little")
    if size_bytes > FRAME_LIMIT_BYTES:
        raise TransferFailed(f"a frame of {size_bytes} bytes is no frame")
    try:
        return TransferFrame.FromString(_receive_exactly(link, size_bytes, until_s))
    except DecodeError:
        raise TransferFailed("a frame that cannot be read") from None


def _receive_exactly(link: socket.socket, nbytes: int, until_s: float | None) -> bytes:
    """`nbytes`, or nothing at the end of the link. Raises TransferFailed when it ends in the middle, or it is late."""
    received = bytearray()
    while len(received) < nbytes:
        if until_s is not None:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                raise TransferFailed("a frame that does not come to its end")
            link.settimeout(left_s)
        part = link.recv(nbytes - len(received))
        if not part:
            if received:
                raise TransferFailed("the link ended within a frame")
            return b""
        received += part
    return bytes(received)
