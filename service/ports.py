"""The one look at a port before a server takes it: who holds it is told before anything is loaded."""

from __future__ import annotations

import errno
import socket

from spec.errors import InvalidConfiguration

_NO_SUCH_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # IPv6 is off on this machine, say


def free_port(host: str = "127.0.0.1", port: int = 0) -> int:
    """`port`, or for 0 one that is free, on every address of `host` that this machine has.

    Raises InvalidConfiguration where it is taken or cannot be had, and for a host that is none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InvalidConfiguration(f"the host {host!r} cannot be listened on: {error.strerror}", key="host") from None
    bound = False
    for family, kind, protocol, _name, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address[0], port, *address[2:]))
                port, bound = probe.getsockname()[1], True
        except OSError as error:
            if error.errno in _NO_SUCH_FAMILY:
                continue
            taken = error.errno == errno.EADDRINUSE
            said = "is taken by another process; choose another port" if taken else f"cannot be used: {error.strerror}"
            message = f"port {port} on {host} {said}"
            raise InvalidConfiguration(message, key="port", port=port) from None
    if not bound:
        raise InvalidConfiguration(f"the host {host!r} is no address of this machine", key="host")
    return port
