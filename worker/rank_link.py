"""The control connections of a worker's ranks: framed, and authenticated both ways with the cluster's key (HMAC)."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import socket
import struct
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection

from google.protobuf.message import Message

from spec.errors import WorkerLost

SEND_TIMEOUT_S = 10  # a rank that is stopped reads nothing, and what it should read fills the connection
DIAL_AGAIN_S = 0.2


def auth_key(cluster_key: bytes) -> bytes:
    return hmac.new(cluster_key, b"legato rank control", hashlib.sha256).digest()


def dial(host: str, port: int, cluster_key: bytes, timeout_s: float) -> Connection:
    """Tries until rank 0 listens. Raises WorkerLost when it does not in time, or has another key."""
    until_s = time.monotonic() + timeout_s
    while True:
        try:
            connection = Client((host, port), "AF_INET", authkey=auth_key(cluster_key))
        except AuthenticationError:
            raise WorkerLost(f"rank 0 at {host}:{port} has another cluster_key") from None
        except (OSError, EOFError) as error:
            if time.monotonic() > until_s:
                raise WorkerLost(f"rank 0 does not answer at {host}:{port}: {error}") from None
            time.sleep(DIAL_AGAIN_S)
            continue
        tune(connection)
        return connection


def tune(connection: Connection) -> None:
    """Small messages leave at once; a send that nobody reads fails; a host that vanishes is noticed."""
    with socket.socket(fileno=connection.fileno()) as own:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_TIMEOUT_S, 0))
        own.detach()


def own_address(connection: Connection) -> str:
    """By which this host reaches the other end, and is reached: a number."""
    with socket.socket(fileno=connection.fileno()) as own:
        address: str = own.getsockname()[0]
        own.detach()
    return address


def send(connection: Connection, message: Message) -> None:
    """Raises WorkerLost when the other end is gone or reads nothing."""
    send_bytes(connection, message.SerializeToString())


def send_bytes(connection: Connection, message: bytes) -> None:
    try:
        connection.send_bytes(message)
    except OSError as error:
        raise WorkerLost(f"the other end of a control connection is gone: {error}") from None


def close(connection: Connection) -> None:
    """Also for whoever waits on it in another thread."""
    with contextlib.suppress(OSError), socket.socket(fileno=connection.fileno()) as own:
        with contextlib.suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)
        own.detach()
