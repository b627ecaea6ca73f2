"""Which transports this process has, why it has not the others, and which one a pair of workers takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvtransfer.probing import PROBE_BYTES, measure
from kvtransfer.transport import Transport
from spec.errors import InvalidConfiguration, TransferFailed, TransportUnavailable


def _open_ucx(host: str) -> Transport:
    from kvtransfer.ucx import UcxTransport  # loads libucp

    return UcxTransport(host)


def _open_sockets(host: str) -> Transport:
    from kvtransfer.sockets import SocketsTransport

    return SocketsTransport(host)


KINDS: dict[str, Callable[[str], Transport]] = {"ucx": _open_ucx, "sockets": _open_sockets}  # best first


def open_transports(names: Sequence[str], host: str = "127.0.0.1") -> tuple[list[Transport], dict[str, str]]:
    """(those that opened, in the order of `names`; why the others did not). `host` is the address peers reach this by.

    Raises InvalidConfiguration for a name that is no transport."""
    opened: list[Transport] = []
    reasons: dict[str, str] = {}
    for name in names:
        if name not in KINDS:
            raise InvalidConfiguration(f"unknown transport {name!r}; known are {', '.join(KINDS)}")
        try:
            opened.append(KINDS[name](host))
        except TransportUnavailable as error:
            reasons[name] = error.message
    return opened, reasons


def in_common(transports: Sequence[Transport], remote_names: Sequence[str]) -> list[Transport]:
    """Those of ours that the peer has too, best first, as ours are."""
    return [transport for transport in transports if transport.name in remote_names]


class Probed(NamedTuple):
    name: str
    available: bool
    detail: str


def probe() -> list[Probed]:
    """What `legato doctor` shows: each transport opened twice, measured from one to the other, and closed again."""
    found = []
    for name in KINDS:
        opened, reasons = open_transports([name])
        for transport in opened:
            other = KINDS[name]("127.0.0.1")
            found.append(Probed(name, True, f"{transport.detail}; {_between(transport, other)}"))
            other.close()
            transport.close()
        found.extend(Probed(name, False, reason) for reason in reasons.values())
    return found


def _between(near: Transport, far: Transport) -> str:
    try:
        region = far.register(PROBE_BYTES)
        peer = near.connect(far.address, region.descriptor)
        found = measure(peer, near.register(PROBE_BYTES), 0, 0)
    except TransferFailed as error:
        return f"it does not get through here: {error.message}"
    return f"{found.bytes_per_s / 1e9:.1f} GB/s and {found.latency_s * 1e6:.0f} us over {peer.runs_over} here"
